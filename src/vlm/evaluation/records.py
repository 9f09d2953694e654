"""Evaluation on a file of records: metrics of losses and of answers, as a table and as files.

Metrics of losses are in `loss_metrics.py`, those of answers in `text_metrics.py`, `object_metrics.py` and
`hallucination.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.schema import InferenceConfig, TrainerOptions
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.encoding.thinking import without_thinking
from vlm.data.objects import MarkedObject
from vlm.data.processor import SampleInputs
from vlm.data.record_identity import identify_records
from vlm.data.records.objects import read_object
from vlm.evaluation.bootstrap import Score, format_scores, scores_to_json
from vlm.evaluation.hallucination import HALLUCINATION_METRICS, compute_hallucination_metrics
from vlm.evaluation.loss_metrics import LOSS_METRICS, Collate, LossMetric, LossMetricSettings
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, measured_objects
from vlm.evaluation.output import write_json, write_rows
from vlm.evaluation.record_sums import RecordSums
from vlm.evaluation.text_metrics import compute_answer_metrics
from vlm.inference.generate import VisionLanguageModel, on_device
from vlm.inference.generate_file import generate_file
from vlm.models.text_loss import SupervisedScores


@dataclass(frozen=True)
class EvaluationResult:
    """The evaluation of a file of records.

    Attributes:
        records: number of records.
        num_answered: number of answered records with references; 0 where only losses were computed.
        exclusions: which records the metrics leave out, and why, as sentences.
        scores: the metrics.
        sums: those of them that are a ratio of sums over records, with these.
        identity: a digest of the records that `sums` are of, see `identify_records`; empty without any.
    """

    records: int
    num_answered: int
    exclusions: tuple[str, ...]
    scores: dict[str, Score]
    sums: Mapping[str, RecordSums] = field(default_factory=dict)
    identity: str = ""

    def __str__(self) -> str:
        """Return the metrics and which records they leave out."""
        return "\n".join([format_scores(self.scores), *(f"\n{sentence}" for sentence in self.exclusions)])


def evaluate(
    model: VisionLanguageModel, config: SourceConfig, names: Sequence[str], folder: Path, settings: InferenceConfig, *,
    cache: Path, fingerprint: str, batch_size: int, num_workers: int, max_frames: int, seed: int | None = None,
    overwrite: bool = False, retrieval_candidates: int = TrainerOptions.eval_retrieval_candidates,
) -> EvaluationResult:  # fmt: skip
    """Evaluate a model on a file of records; `answers.jsonl` is written answer by answer.

    Args:
        model: the model.
        config: where the records are and how to read them.
        names: names of metrics, see `ALL_METRICS`.
        folder: the folder of `answers.jsonl` (of `answers-blank.jsonl` for metrics of `hallucination.py`), and of
            `<metric>.jsonl` for metrics of losses that have rows.
        settings: generation settings.
        cache: the folder of record indices.
        fingerprint: of the checkpoint, and of how it is loaded.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        max_frames: the largest number of frames read from a video.
        seed: makes sampling repeatable.
        overwrite: whether to replace answers that exist or were begun.
        retrieval_candidates: number of texts among which `retrieval` looks for an image's own, that one included.

    Raises:
        ValueError: answers exist already, no answer can be evaluated, or a metric cannot be computed on these records.
    """
    scores: dict[str, Score] = {}
    exclusions: list[str] = []
    sums: dict[str, RecordSums] = {}
    records, num_answered, identity = 0, 0, ""
    if loss_names := [name for name in names if name in LOSS_METRICS]:
        dataset = load_supervised_dataset(model, config, max_frames)
        records = dataset.contributions[0].records
        metrics = prepare_loss_metrics(dataset, loss_names, retrieval_candidates)
        exclusions += describe_loss_exclusions(dataset, metrics)
        losses, identity = InferenceLosses(model, batch_size, num_workers), identify_records(dataset)
        for name, metric in metrics.items():
            result = metric.compute(dataset, losses)
            scores |= result.scores
            sums |= result.sums
            write_rows(folder / f"{name}.jsonl", result.rows)
    if answer_names := [name for name in names if name not in LOSS_METRICS]:
        generate = partial(
            generate_file, model, config, settings=settings, cache=cache, fingerprint=fingerprint,
            batch_size=batch_size, num_workers=num_workers, max_frames=max_frames, seed=seed, overwrite=overwrite,
        )  # fmt: skip
        measured = _measure_answers(answer_names, str(config.path), folder, generate)
        records, num_answered = measured.records, measured.num_answered
        scores |= measured.scores
        exclusions += measured.exclusions
    return EvaluationResult(records, num_answered, tuple(exclusions), scores, sums, identity)


def _measure_answers(
    names: Sequence[str], path: str, folder: Path, generate: Callable[..., list[dict[str, object]]]
) -> EvaluationResult:
    """Measure answers, which `generate` writes into a file: about the images, and about blank ones where asked.

    Raises:
        ValueError: no answer can be evaluated.
    """
    rows = generate(output=folder / "answers.jsonl")
    answered = [row for row in rows if not row["error"] and row["references"]]
    bad = [(row["source"], row["error"]) for row in rows if row["error"]]
    unreferenced = [(row["source"], "") for row in rows if not row["error"] and not row["references"]]
    problem = "have neither a reply nor `answers` to compare an answer with"
    exclusions = describe_exclusion(bad, len(rows), "could not be used")
    exclusions += describe_exclusion(unreferenced, len(rows), problem)
    if not answered:
        raise ValueError(f"{path}: no answers to measure. {' '.join(exclusions)}")
    references = [cast("list[str]", row["references"]) for row in answered]
    objects = [ObjectAnswer(_objects(row["objects"]), _objects(row["true_objects"])) for row in answered]
    answers = [without_thinking(str(row["answer"])) for row in answered]
    scores = compute_answer_metrics(
        [name for name in names if name not in HALLUCINATION_METRICS], answers, references, objects
    )
    if seen_wrongly := [name for name in names if name in HALLUCINATION_METRICS]:
        blank_rows = generate(output=folder / "answers-blank.jsonl", is_blank=True)
        pairs = zip(rows, blank_rows, strict=True)
        blank = [str(other["answer"]) for row, other in pairs if not row["error"] and row["references"]]
        images = [str(row["image_path"]) for row in answered]
        scores |= compute_hallucination_metrics(
            seen_wrongly, answers, list(map(without_thinking, blank)), references, images
        )
    for name in (name for name in names if name in OBJECT_METRICS):
        if left_out := sum(not measured_objects(name, answer).true for answer in objects):
            exclusions.append(f"{left_out:,} of {len(rows):,} records tell no place that {name} measures")
    return EvaluationResult(len(rows), len(answered), tuple(exclusions), scores)


def _objects(items: object) -> list[MarkedObject]:
    """Return the objects of a row of answers."""
    return [read_object(item, "objects", "?") for item in cast("list[object]", items)]


def prepare_loss_metrics(
    dataset: SampleDataset, names: Sequence[str], retrieval_candidates: int
) -> dict[str, LossMetric]:
    """Return metrics of losses by their names, prepared for all samples.

    Raises:
        ValueError: a metric cannot be computed on them.
    """
    advice = f"leave it out of --metrics, or lower --retrieval-candidates (now {retrieval_candidates})"
    settings = LossMetricSettings(retrieval_candidates, None, advice)
    return {name: LOSS_METRICS[name](dataset, settings) for name in names}


def describe_loss_exclusions(dataset: SampleDataset, metrics: Mapping[str, LossMetric]) -> list[str]:
    """Return sentences about the records of a file that metrics of losses leave out."""
    records = dataset.contributions[0].records
    skipped = [(record.id, record.reason) for record in dataset.skipped]
    sentences = describe_exclusion(skipped, records, "are not in the losses")
    reason = "they show no image or video, or do not end with a supervised reply of text"
    for name, metric in metrics.items():
        if others := len(dataset) - metric.num_samples:
            sentences.append(f"{others:,} of {records:,} records are not in {name}: {reason}")
    return sentences


def describe_exclusion(excluded: Sequence[tuple[object, object]], records: int, problem: str) -> list[str]:
    """Return a sentence about records that a metric leaves out, given by their ids and reasons; none without any."""
    if not excluded:
        return []
    name, reason = excluded[0]
    sentence = f"{len(excluded):,} of {records:,} records {problem}; the first is {name!r}"
    return [f"{sentence}: {reason}" if reason else sentence]


def load_supervised_dataset(model: VisionLanguageModel, config: SourceConfig, max_frames: int) -> SampleDataset:
    """Return the records of a file as training reads them; unusable records are left out and listed.

    Raises:
        ValueError: no record can be used.
    """
    data = DatasetConfig(
        **asdict(config), max_frames=max_frames, on_bad_sample="skip", over_length="skip", max_skipped=1.0
    )
    return load_dataset(data, SampleEncoder(model.processor, model.positions, truncate=False), evaluates=True)


@dataclass
class InferenceLosses:
    """A `LossSource`: a model ready for inference, on this process alone.

    Attributes:
        ready: the model with its processor; it keeps features of recent images.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        compute_losses: computes losses of the model.
    """

    ready: VisionLanguageModel
    batch_size: int
    num_workers: int
    compute_losses: SupervisedScores = field(init=False)

    def __post_init__(self):
        """Make what computes the losses."""
        self.compute_losses = SupervisedScores(self.ready.model)

    def batches(self, dataset: Dataset[object], title: str, collate: Collate | None = None) -> Iterator[SampleInputs]:
        """Yield batches on the model's device; see `LossSource`."""
        size, collate_fn = (self.batch_size, Collator.of(self.ready.processor)) if collate is None else (1, collate)
        loader = DataLoader(dataset, size, collate_fn=collate_fn, num_workers=self.num_workers)
        for batch in tqdm(loader, title, unit="batch" if collate is None else "record", disable=None):
            for skipped in batch.pop(SKIPPED_KEY, []):
                raise skipped.as_error()
            yield (
                self._prepare(batch) if collate is None else {name: self._prepare(part) for name, part in batch.items()}
            )

    def _prepare(self, batch: SampleInputs) -> dict[str, Tensor]:
        """Return a batch on the device, with features of images that are known in place of their pixels."""
        device = self.ready.model.device
        labels = batch["labels"].to(device)
        inputs = self.ready.use_cached_features(on_device(batch, self.ready.processor, device))
        return {**inputs, "labels": labels}

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor: there are no other ranks."""
        return tensor


def write_results(folder: Path, result: EvaluationResult, run_info: dict[str, object]) -> None:
    """Write `results.json` and `results.md`: the metrics, and which model and data they are of."""

    def format_number(number: float | None) -> str:
        """Return a number with four digits, or that it is undefined."""
        return "undefined" if number is None else f"{number:.4g}"

    write_json(
        folder,
        {
            **run_info,
            "records": result.records,
            "answered": result.num_answered,
            "left_out": list(result.exclusions),
            "metrics": scores_to_json(result.scores),
        },
    )
    title = f"`{run_info['checkpoint']}` on `{run_info['data']}`, {result.records:,} records"
    rows = [("metric", "value", "95% interval")]
    for name, score in result.scores.items():
        interval = "" if score.low is None else f"{format_number(score.low)} to {format_number(score.high)}"
        rows.append((name, format_number(score.value), interval))
    parts = [title, tabulate(rows, "firstrow", tablefmt="github", disable_numparse=True), *result.exclusions]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
