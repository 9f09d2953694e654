"""`trainer.before_after`: a run compares its model at the end with the one that it began with.

What the model made of the records before the first step is in `before_after/` of the run directory, so that a run that
is resumed has it. All ranks answer the same records in the same batches, since under ZeRO-3 every rank takes part in
every call; rank 0 writes.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.config.choices import ANSWER_METRICS
from vlm.config.dataset_schema import SourceConfig
from vlm.config.schema import RunConfig
from vlm.data.cache import resolve_cache_folder
from vlm.data.dataset import SampleDataset, draw_records
from vlm.data.progress import show_progress
from vlm.data.sample import BadSample
from vlm.data.sources import Source
from vlm.data.stream import SampleStream
from vlm.evaluation.comparison.measure import Measured, Measurer
from vlm.evaluation.comparison.records import HELD_OUT, PROBE, ComparedRecord, read_compared
from vlm.evaluation.comparison.report import compare, write_comparison
from vlm.evaluation.probe.write import PROBE_FILE, write_probe
from vlm.inference.generate import VisionLanguageModel
from vlm.models.text_loss import SupervisedScores
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.distributed import broadcast_from_rank0, on_rank0
from vlm.train.objectives.base import ObjectiveTrainer, PreparedRun
from vlm.train.random_state import separate_random_state
from vlm.train.step.compile import force_eager

log = logging.getLogger(__name__)

FOLDER = "before_after"
"""The folder of the run directory that holds everything about the comparison."""
BEFORE_FILE, AFTER_FILE = "before.jsonl", "after.jsonl"
NO_MEAN = "bleu"
"""The metric that has no value for each answer, so that records cannot be paired."""


class BeforeAfter(TrainerCallback):
    """Measures the model before the first step, and compares it at the end.

    Args:
        config: the run's configuration.
        run: the run, whose evaluation records are answered.
        trainer: the run's trainer.
        get_scores: returns what computes the losses of the run's model.
    """

    def __init__(
        self, config: RunConfig, run: PreparedRun, trainer: ObjectiveTrainer, get_scores: Callable[[], SupervisedScores]
    ):
        self.config, self.run, self.trainer, self.get_scores = config, run, trainer, get_scores
        self.folder = run.folder / FOLDER
        chosen = [name for name in config.trainer.eval_metrics if name in ANSWER_METRICS and name != NO_MEAN]
        self.metrics = chosen or ["exact_match"]
        self.records: list[ComparedRecord | BadSample] = []
        self.before: list[Measured] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Measure the model, or read what it was when a run that is resumed began.

        Raises:
            ValueError: a run that is resumed began without this, or with other records; or none can be asked.
        """
        self.records = self._read_records()
        file = self.folder / BEFORE_FILE
        if state.global_step == 0:
            self.before = self._measure("before training", ())
            if all(row.error for row in self.before):
                problem = f"none of {len(self.before)} records can be used; the first error is: {self.before[0].error}"
                raise ValueError(f"trainer.before_after=true: {problem}; leave it out")
            on_rank0(lambda: _write(file, self.before))
            return
        rows = on_rank0(lambda: _read(file))
        if rows is None:
            raise ValueError(
                f"trainer.before_after=true: {file} does not exist, because the run began without this setting. Leave "
                "it out, and compare with vlm compare-models"
            )
        self.before = rows
        if [row.id for row in rows] != [_name(record) for record in self.records]:
            raise ValueError(
                f"trainer.before_after=true: {file} has answers to other records. Set trainer.before_after_samples and "
                "trainer.before_after_probe to their earlier values, or leave it out"
            )

    def finish(self, final: Path) -> None:
        """Measure the trained model, and write what moved; `final` is its name there. Every rank calls it."""
        answers = [row.answer for row in self.before]
        after = self._measure("after training", answers)
        samples = [record.sample if isinstance(record, ComparedRecord) else None for record in self.records]

        def write() -> None:
            """Compare, and write all files."""
            _write(self.folder / AFTER_FILE, after)
            comparison, places = compare(("start of the run", str(final)), self.before, after, self.metrics)
            info: dict[str, object] = {"metrics": self.metrics}
            compared = [sample for place in places if (sample := samples[place]) is not None]
            write_comparison(comparison, compared, self.folder, info)
            log.info("Before and after:\n\n%s\n\nReport: %s", comparison, self.folder / "report.md")

        on_rank0(write)

    def _read_records(self) -> list[ComparedRecord | BadSample]:
        """Return evaluation records, drawn with the run's seed, and the probe."""
        options, records = self.config.trainer, list[ComparedRecord | BadSample]()
        evaluation = self.run.data.records.get("eval")
        if isinstance(evaluation, SampleDataset):
            for index in draw_records(len(evaluation), options.before_after_samples, self.run.args.seed).tolist():
                source, number = evaluation.places[index].tolist()
                records += read_compared(evaluation.sources[source], [number], HELD_OUT)
        if options.before_after_probe:
            folder = self.folder / PROBE
            on_rank0(lambda: write_probe(folder, options.before_after_probe))
            config = SourceConfig(path=str(folder / PROBE_FILE))
            train = self.run.data.records["train"]
            assert isinstance(train, SampleDataset | SampleStream)
            encoder, dataset = train.sources[0].encoder, self.config.dataset
            source = Source(PROBE, config, resolve_cache_folder(dataset.cache_dir), encoder, dataset.max_frames)
            records += read_compared(source, range(len(source)), PROBE)
        return records

    def _measure(self, title: str, others: Sequence[str | None]) -> list[Measured]:
        """Return what the model as it is makes of the records; every rank measures all of them."""
        trainer, args = self.trainer, self.run.args
        settings = replace(self.config.inference, temperature=0.0, top_p=1.0)
        was_training = trainer.model.training
        trainer.model.eval()
        rows: list[Measured] = []
        ready = VisionLanguageModel(trainer.model, self.run.processor)
        size, silent = args.per_device_eval_batch_size, args.disable_tqdm or not args.should_save
        with trainer.compute_loss_context_manager(), force_eager(), separate_random_state(args.seed):
            measurer = Measurer(ready, settings, self.get_scores(), {"synced_gpus": dist.is_initialized()})
            for start in show_progress(range(0, len(self.records), size), title, silent=silent):
                part = slice(start, start + size)
                rows += measurer.measure(self.records[part], others[part])
                trainer.mark_progress()
        trainer.model.train(was_training)
        return broadcast_from_rank0(rows)


def _name(record: ComparedRecord | BadSample) -> str:
    return record.sample_id if isinstance(record, BadSample) else record.sample.id


def _write(file: Path, rows: Sequence[Measured]) -> None:
    """Write rows as JSON lines, all of them or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(file, "".join(f"{json.dumps(row.as_row(), ensure_ascii=False)}\n" for row in rows))


def _read(file: Path) -> list[Measured] | None:
    """Return the rows of a file; None if there is none."""
    if not file.is_file():
        return None
    return [Measured.from_row(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
