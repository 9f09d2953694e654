"""Finds out what a run will do: its data, its parts, its memory, its time, and what would go wrong."""

import base64
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from vlm.assembly.family_trial.verdicts import read_unused
from vlm.assembly.private_names import check_private_names
from vlm.assembly.resolve import resolve_model
from vlm.config.derived import embedding_row_keys
from vlm.config.named import is_custom_name
from vlm.config.schema import RunConfig
from vlm.data.counted_later import CountedLater
from vlm.data.dataset import SampleDataset
from vlm.data.pages import tokens_as_text
from vlm.data.records.guess import guess_form
from vlm.data.sample import group_reasons
from vlm.data.skipped import Skipped
from vlm.train.family_trial import check_family, check_videos
from vlm.train.objectives.base import PreparedRun, RunData
from vlm.train.objectives.table import make_objective
from vlm.train.parts import parameter_groups, table
from vlm.train.preflight.duration import predict_disk, predict_time
from vlm.train.preflight.findings import DataFindings, Findings
from vlm.train.preflight.libraries import libraries_restored
from vlm.train.preflight.memory import ModelSizes
from vlm.train.preflight.probe import prepare_run, probe_arguments, quiet_config, remove, run_probe, throwaway_folder
from vlm.train.preflight.problems import find_problems
from vlm.train.preflight.step_memory import inspect_memory
from vlm.train.run_directory import contribution_table

log = logging.getLogger(__name__)

NUM_POINTS = 200
"""Points of a learning-rate curve."""


def inspect_run(config: RunConfig, name: str, overrides: Sequence[str] = ()) -> Findings:
    """Make a few steps of a run and throw them away; return what it will do. `config` is not changed.

    Raises:
        ValueError: the run would be refused, with the message that it would have.
    """
    check_private_names()
    folder = throwaway_folder()
    try:
        with without_chatter(), libraries_restored():
            return _inspect(config, quiet_config(config, folder), name, overrides, folder)
    finally:
        remove(folder)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Leave out what a run logs, and the bars of weights that load; warnings stay."""
    logger = logging.getLogger("vlm")
    level, bars = logger.level, is_progress_bar_enabled()
    logger.setLevel(logging.WARNING)
    disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bar()


def _inspect(config: RunConfig, probing: RunConfig, name: str, overrides: Sequence[str], folder: Path) -> Findings:
    begun = time.perf_counter()
    findings = Findings(name, describe_start(config))
    objective = make_objective(probing)
    resolved = resolve_model(probing, overrides)
    args = probe_arguments(probing, [*objective.training_keys(), *embedding_row_keys(probing)])
    verdicts = check_family(probing, *resolved, objective.packing_proofs)
    data = objective.load_data(*resolved, args)
    if isinstance(records := data.records["train"], CountedLater):
        records.wait()
    check_videos(probing, resolved[0], verdicts, data.records.values())
    findings.data = inspect_data(data, config)
    run = prepare_run(objective, folder, resolved, args, data, read_unused(verdicts))
    findings.parts = table(run.parts)
    sizes = ModelSizes.of(run.model)
    findings.first_sample = first_sample(data)
    probe = run_probe(objective, run, config, begun)
    findings.first_batch = inline_images(folder)
    own = _own_arguments(config, args)
    findings.memory = inspect_memory(objective, run, config, resolved, probe, sizes)
    findings.disk = predict_disk(config, own, sizes, findings.memory.predicted)
    findings.duration = predict_time(probe, config, own, data.records["train"], data.evaluation, findings.disk)
    findings.rates = learning_rates(run, own, probe.max_steps)
    findings.problems += find_problems(config, findings)
    return findings


def _own_arguments(config: RunConfig, args: TrainingArguments) -> TrainingArguments:
    """Return the arguments with what the probe has changed as the run has it."""
    names = (
        "save_strategy",
        "save_steps",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "max_steps",
        "num_train_epochs",
    )
    for key in names:
        if (value := getattr(config.trainer, key)) is not None:
            setattr(args, key, value)
    return args


def describe_start(config: RunConfig) -> str:
    """Return what a run starts from, in a line."""
    trainer, model = config.trainer, config.model
    if trainer.from_pretrained is not None:
        return f"the checkpoint {trainer.from_pretrained}"
    if model.hf_name is not None:
        return f"the model {model.hf_name}"
    parts = f"{model.visual_encoder.hf_name} and {model.language_model.hf_name}"
    return f"{parts} with a new connector"


def inspect_data(data: RunData, config: RunConfig) -> DataFindings:
    """Return what the training records are."""
    train = data.records["train"]
    if not isinstance(train, SampleDataset):
        return DataFindings(table="a stream: its records are not known before they are read")
    forms = []
    for source in train.sources:
        record = source.records[0] if len(source.records) else None
        forms.append(f"{source.name}: {describe_form(record, source.config.format)}")
    longest = train.sources[0].encoder.longest if train.sources else 0
    reasons = group_reasons(train.skipped)
    return DataFindings(contribution_table(train.contributions), forms, train.lengths.tolist(), longest, reasons)


def describe_form(record: object, format_name: str) -> str:
    """Return which format reads records, and whether their first one fits it or looks like another format's."""
    guess = guess_form(record)
    reading = f"read with dataset.format={format_name}"
    if guess is None or guess.format is None or is_custom_name(format_name):
        return reading
    return f"{reading}, {'which fits them' if guess.format == format_name else f'but they look like {guess.what}'}"


def first_sample(data: RunData) -> str:
    """Return the first training sample as text, its supervised tokens marked; empty where it has none."""
    train = data.records["train"]
    if not isinstance(train, SampleDataset):
        return ""
    item = train[0]
    if isinstance(item, Skipped) or "labels" not in item:
        return ""
    labels = [int(label) for label in item["labels"]]
    return tokens_as_text([int(number) for number in item["input_ids"]], labels, train.processor, colours=False)


def inline_images(folder: Path) -> str:
    """Return the body of `first_batch.html` with its images in it; empty where the objective wrote none."""
    file = folder / "first_batch.html"
    if not file.is_file():
        return ""
    body = re.findall(r"<section>.*?</section>", file.read_text(encoding="utf-8"), re.DOTALL)

    def inline(match: re.Match[str]) -> str:
        """Return an image as a data URI."""
        image = folder / match[1]
        content = base64.b64encode(image.read_bytes()).decode() if image.is_file() else ""
        return f'src="data:image/png;base64,{content}"'

    return re.sub(r'src="(first_batch/[\w./-]+)"', inline, "".join(body))


def learning_rates(run: PreparedRun, args: TrainingArguments, steps: int) -> dict[str, list[tuple[int, float]]]:
    """Return the learning rate of each part over the steps of a run; empty for schedules that depend on metrics."""
    groups = {}
    for group in parameter_groups(run.parts, ()):
        groups.setdefault(str(group["name"]).partition(".")[0], float(group["lr"]))
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in groups.values()], lr=0.0
    )
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(steps),
        steps,
        args.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
    )
    if not isinstance(schedule, LambdaLR):
        return {}
    points = sorted({round(index * steps / NUM_POINTS) for index in range(NUM_POINTS + 1)})
    return {
        name: [(step, rate * schedule.lr_lambdas[number](step)) for step in points]
        for number, (name, rate) in enumerate(groups.items())
    }
