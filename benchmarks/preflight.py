"""What `vlm check` predicts against what runs do: peak memory, and the time of a step.

    python -m benchmarks.preflight [--cases NAME …] [--threads N]

Small models of different parts train on the CPU, on one thread. The memory of the probe's second step is counted on
fake tensors (predicted) and on the tensors of the step itself (measured): both see tensors, neither what a kernel takes
for itself. The time of a step is predicted from the timed steps of a probe, and compared with the mean of the steps of
a whole epoch, which begins right behind the probe: steps of a part of it would have another mean size. Each time is
told by the clock, and by the processor time of the process, which other programs disturb less. A fixed product of
matrices is timed before and after each probe and run: where it takes longer, the machine was busy.
"""

import argparse
import copy
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.lengths import draw_records, write_records
from benchmarks.report import RESULTS
from benchmarks.shapes import SHAPES, write_parts
from benchmarks.variants import silence_libraries
from tests.tiny_parts import Parts
from vlm.assembly.resolve import resolve_model
from vlm.config.schema import RunConfig
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import SampleDataset
from vlm.train.arguments import training_arguments
from vlm.train.make_trainer import make_trainer
from vlm.train.model import compute_dtype
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.objectives.table import make_objective
from vlm.train.preflight import duration, probe
from vlm.train.preflight.memory import MemoryPrediction, ModelSizes, predict_memory
from vlm.train.preflight.step_time import StepTime, fit_step_time

SHAPE = "small"
NUM_RECORDS = 24
"""Records that are drawn; those that are too long are left out."""
BATCH = 2
"""Samples of a step."""
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.15
WHOLE_RUN = ("trainer.eval_strategy=epoch", "trainer.save_strategy=steps", "trainer.save_steps=3")
"""A run that evaluates and saves, whose time as a whole is compared too."""
LORA = ("trainer/lora=language-model", "trainer/unfreeze=connector")
ALL = ("trainer/unfreeze=all", "trainer.learning_rate.visual_encoder_learning_rate=1e-4")
CASES: dict[str, tuple[str, ...]] = {
    "packed": (),
    "padded": ("trainer.packing=false",),
    "connector alone": ("trainer/unfreeze=connector",),
    "LoRA": LORA,
    "all parts": ALL,
    "checkpointed": ("trainer.activation_checkpointing=true",),
    "checkpointed, LoRA": (*LORA, "trainer.activation_checkpointing=true"),
    "bfloat16": ("trainer.bf16=true",),
    "accumulated, padded": ("trainer.packing=false", "trainer.per_device_train_batch_size=1",
                            "trainer.gradient_accumulation_steps=2"),
    "pixel shuffle": ("model/connector=pixel_shuffle",),
    "resampler": ("model/connector=resampler",),
    "Muon": ("trainer.optim=muon",),
    "SigLIP, Qwen3": ("siglip", "qwen3"),
    "DINOv2, Gemma 2": ("dinov2", "gemma2"),
}  # fmt: skip
"""Name -> overrides, or an encoder and a language model of `tests/tiny_parts.py`."""


@dataclass(frozen=True)
class Outcome:
    """What was predicted and measured of a case.

    Attributes:
        memory: bytes, predicted and measured.
        cpu_seconds: of a step's processor time: predicted, measured, and half the width of the interval.
        wall_seconds: the same by the clock.
        reference: processor seconds of a fixed product before the probe, between probe and run, and behind the run.
        load: how many processes wanted a core of this machine, on average over a minute, before and behind.
    """

    memory: tuple[float, float]
    cpu_seconds: tuple[float, float, float]
    wall_seconds: tuple[float, float, float]
    reference: tuple[float, float, float]
    load: tuple[float, float]


class StepClock(TrainerCallback):
    """Notes the processor time and the clock before the first step, and at the end of each."""

    def __init__(self):
        self.ends: list[tuple[float, float]] = []

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Note the times."""
        self.ends.append((time.process_time(), time.perf_counter()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Note the times."""
        self.ends.append((time.process_time(), time.perf_counter()))

    def mean(self, clock: int) -> float:
        """Return the seconds of a step: by processor time (0) or by the clock (1)."""
        return (self.ends[-1][clock] - self.ends[0][clock]) / (len(self.ends) - 1)


def reference_seconds() -> float:
    """Return the processor seconds of a fixed product, the quickest of three."""
    matrix, seconds = torch.ones(768, 768), []
    for _ in range(3):
        begun = time.process_time()
        for _ in range(8):
            torch.mm(matrix, matrix)
        seconds.append(time.process_time() - begun)
    return min(seconds)


def words_of(case: Sequence[str], folder: Path) -> list[str]:
    """Return the overrides of a case."""
    parts = Parts(folder / "tiny")
    is_tiny = len(case) == 2 and "=" not in case[0]
    encoder = parts.encoder(case[0]) if is_tiny else folder / "parts" / "visual_encoder"
    language_model = parts.language_model(case[1]) if is_tiny else folder / "parts" / "language_model"
    data = folder / "data"
    return [
        f"model.visual_encoder.hf_name={encoder}", f"model.language_model.hf_name={language_model}",
        f"dataset.path={data / 'records.json'}", f"dataset.image_folder={data / 'images'}",
        f"dataset.cache_dir={data / 'cache'}", "dataset.template=chatml", "dataset.max_length=256",
        "trainer.use_cpu=true", f"trainer.per_device_train_batch_size={BATCH}",
        "trainer.train_sampling_strategy=random",
        *(() if is_tiny else case),
    ]  # fmt: skip


def prepare(config: RunConfig, folder: Path) -> tuple[Objective, PreparedRun]:
    """Return the objective and the prepared run of a configuration."""
    objective = make_objective(config)
    resolved = resolve_model(config)
    args = probe.probe_arguments(config, list(objective.training_keys()))
    data = objective.load_data(*resolved, args)
    return objective, probe.prepare_run(objective, folder, resolved, args, data)


def probe_run(config: RunConfig, folder: Path) -> tuple[probe.Probe, Objective, PreparedRun, MemoryPrediction]:
    """Return what a probe of a run shows, what it was made of, and the memory of its second step."""
    probing = probe.quiet_config(config, folder)
    objective, run = prepare(probing, folder)
    found = probe.run_probe(objective, run, config)
    image = dummy_image(run.processor)[1]
    memory = predict_memory(objective, run.model, probing, run.args, image, found.shapes, compute_dtype(run.args))
    return found, objective, run, memory


def predict_steps(
    found: probe.Probe, run: PreparedRun, seconds: list[float], config: RunConfig, steps: int
) -> StepTime:
    """Predict the mean step of an epoch from the seconds of the timed ones."""
    train, strategy = run.data.records["train"], str(config.trainer.train_sampling_strategy)
    sizes = duration.StepSizes(found, 1, strategy)
    assert isinstance(train, SampleDataset)
    size = sizes.of_samples(train, len(train) / steps)
    assert size is not None
    return fit_step_time(sizes.timed, seconds, size, steps)


def measure(config: RunConfig, folder: Path) -> Outcome:
    """Predict a run from a probe, then make its steps."""
    load, references = os.getloadavg()[0], [reference_seconds()]
    found, objective, run, predicted = probe_run(config, folder / "probe")
    train = run.data.records["train"]
    assert isinstance(train, SampleDataset)
    steps = -(-len(train) // BATCH)
    times = (found.cpu_seconds, found.seconds)
    cpu, wall = (predict_steps(found, run, seconds, config, steps) for seconds in times)
    references.append(reference_seconds())
    args = copy.copy(run.args)
    args.max_steps, args.output_dir = steps, str(folder / "run")
    trainer, watch = make_trainer(objective, replace(run, folder=folder / "run", args=args)), StepClock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    references.append(reference_seconds())
    return Outcome(
        (predicted.peak, found.peak), (cpu.mean, watch.mean(0), cpu.margin or 0.0),
        (wall.mean, watch.mean(1), wall.margin or 0.0), (references[0], references[1], references[2]),
        (load, os.getloadavg()[0]),
    )  # fmt: skip


def measure_whole(config: RunConfig, folder: Path) -> dict[str, float]:
    """Return the seconds of a run that evaluates and saves: predicted, and by the clock, without loading."""
    found, _, run, memory = probe_run(config, folder / "probe")
    own = training_arguments(config.trainer)
    disk = duration.predict_disk(config, own, ModelSizes.of(run.model), memory)
    records = run.data.records["train"]
    times = duration.predict_time(found, config, own, records, run.data.evaluation, disk)
    assert times is not None
    config.trainer.output_dir = str(folder / "run")
    objective, run = prepare(config, folder / "run")
    objective.before_training(run)
    trainer = make_trainer(objective, run)
    trainer.remove_callback(PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    measured = time.perf_counter() - begun
    margin = (times.margin or 0.0) * times.steps
    return {"predicted": times.total - times.loading, "margin": margin, "measured": measured, "steps": times.training,
            "evaluation": times.evaluation, "answers": times.answering, "saving": times.saving,
            "plots": times.drawing}  # fmt: skip


def describe_machine(threads: int) -> dict[str, object]:
    """Return what figures depend on."""
    version, load = torch.__version__, os.getloadavg()
    return {"cores": os.cpu_count(), "threads": threads, "load at the start": load, "torch": version}


def main() -> None:
    """Measure every case, print the table and put them into `results/preflight.json`."""
    from tests.fixtures import compose_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_libraries()
    logging.disable(logging.WARNING)
    machine, begun = describe_machine(args.threads), time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "parts", SHAPES[SHAPE])
        write_records(folder / "data", draw_records(NUM_RECORDS), SHAPES[SHAPE].side)
        for number, case in enumerate(args.cases):
            config = compose_config("finetune-smol", words_of(CASES[case], folder))
            outcomes[case] = measure(config, folder / str(number))
            print(row_of(case, outcomes[case]), flush=True)
            write(machine, {case: asdict(outcomes[case])})
        records = folder / "data"
        evaluated = [f"dataset.eval_path={records / 'records.json'}", f"dataset.eval_image_folder={records / 'images'}"]
        words = [*words_of((), folder), *WHOLE_RUN, *evaluated, "trainer.num_train_epochs=1"]
        whole = measure_whole(compose_config("finetune-smol", words), folder / "whole")
    shown = ", ".join(f"{key} {value:.2f} s" for key, value in whole.items())
    print(f"with an evaluation, sample answers and 5 checkpoints: {shown}")
    print(f"{time.perf_counter() - begun:.0f} s in all")
    summarise(outcomes)
    write(machine, {}, whole)


def write(
    machine: dict[str, object], cases: dict[str, dict[str, object]], whole: dict[str, float] | None = None
) -> None:
    """Put outcomes into `results/preflight.json`, as soon as they are there; other cases stay as they were measured."""
    file = RESULTS / "preflight.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content["machine"] = machine
    content["cases"] = {**content.get("cases", {}), **cases}
    if whole is not None:
        content["whole run"] = whole
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def row_of(case: str, found: Outcome) -> str:
    """Return a row of the table."""
    predicted, measured = (number / 2**20 for number in found.memory)
    cells = f"{case:<24}{predicted:>8.1f}{measured:>8.1f} MiB{predicted / measured - 1:>+7.1%}"
    for name, (step, took, margin) in (("cpu", found.cpu_seconds), ("wall", found.wall_seconds)):
        cells += f"  {name} {step:.3f} ±{margin:.3f} {took:.3f} s{step / took - 1:>+7.1%}"
    slower = max(found.reference) / min(found.reference)
    return f"{cells}  load {found.load[0]:.1f} {found.load[1]:.1f}, reference x{slower:.2f}"


def summarise(outcomes: dict[str, Outcome]) -> None:
    """Print how far predictions are off."""
    values = {
        "memory": ([found.memory for found in outcomes.values()], MEMORY_WITHIN),
        "processor time": ([found.cpu_seconds[:2] for found in outcomes.values()], TIME_WITHIN),
        "time": ([found.wall_seconds[:2] for found in outcomes.values()], TIME_WITHIN),
    }
    for name, (pairs, within) in values.items():
        off = [abs(predicted / measured - 1) for predicted, measured in pairs]
        hits = sum(value <= within for value in off)
        print(f"{name}: median {statistics.median(off):.1%} off, most {max(off):.1%}; "
              f"{hits} of {len(off)} within {within:.0%}")  # fmt: skip
    for name, times in (("processor time", "cpu_seconds"), ("time", "wall_seconds")):
        held = sum(abs(step - took) <= margin for step, took, margin in (getattr(f, times) for f in outcomes.values()))
        print(f"{name}: {held} of {len(outcomes)} intervals of 90 % hold the run")


if __name__ == "__main__":
    main()
