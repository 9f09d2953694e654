"""What a model's answers to a file of records are worth: losses and metrics of answers, as a table and as files.

May import what generates and measures. A metric of answers is added in `text_metrics.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlm.config.schema import DatasetConfig, InferenceConfig, SourceConfig
from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.dataset import BlankImageDataset, SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.evaluation.bootstrap import Score, format_scores, scores_to_json
from vlm.evaluation.loss import loss_metrics, sample_losses
from vlm.evaluation.output import write_json
from vlm.evaluation.text_metrics import LOSS, compute_text_metrics
from vlm.inference.generate import VisionLanguageModel, on_device
from vlm.inference.generate_file import generate_file


@dataclass(frozen=True)
class EvaluationResult:
    """What came of a file of records.

    Attributes:
        records: how many there are.
        answered: how many were answered and have references; 0 where only losses were asked for.
        left_out: what is not in the measures, and why, as sentences.
        scores: the metrics.
    """

    records: int
    num_answered: int
    exclusions: tuple[str, ...]
    scores: dict[str, Score]

    def __str__(self) -> str:
        return "\n".join([format_scores(self.scores), *(f"\n{one}" for one in self.exclusions)])


def evaluate(
    model: VisionLanguageModel, config: SourceConfig, names: Sequence[str], folder: Path, settings: InferenceConfig, *,
    cache: Path, fingerprint: str, batch_size: int, num_workers: int, max_frames: int, seed: int | None = None,
    overwrite: bool = False,
) -> EvaluationResult:  # fmt: skip
    """Measure a model on a file of records; its answers are written to `answers.jsonl` as they come.

    Args:
        model: the model.
        config: the records and how they are read.
        names: of `ALL_METRICS`.
        folder: where `answers.jsonl` is written.
        settings: how answers are drawn.
        cache: where indices of records are kept.
        fingerprint: of the checkpoint, and of the form in which it is loaded.
        batch_size: records at a time.
        num_workers: processes that read and decode images.
        max_frames: of a video.
        seed: makes sampling repeatable.
        overwrite: whether answers that are there, or were begun, are replaced.

    Raises:
        ValueError: there are answers already, or none can be measured.
    """
    scores: dict[str, Score] = {}
    exclusions: list[str] = []
    records = num_answered = 0
    if LOSS in names:
        dataset = load_supervised_dataset(model, config, max_frames)
        scores |= compute_losses(model, dataset, batch_size=batch_size, num_workers=num_workers)
        records = dataset.contributions[0].records
        if dataset.skipped:
            first = dataset.skipped[0]
            exclusions.append(f"{len(dataset.skipped):,} of {records:,} records are not in the losses; the first is "
                            f"{first.id!r}: {first.reason}")  # fmt: skip
    if of_answers := [name for name in names if name != LOSS]:
        rows = generate_file(
            model, config, folder / "answers.jsonl", settings, cache=cache, fingerprint=fingerprint,
            batch_size=batch_size, num_workers=num_workers, max_frames=max_frames, seed=seed, overwrite=overwrite,
        )  # fmt: skip
        known = [row for row in rows if not row["error"] and row["references"]]
        exclusions += describe_exclusions(rows)
        if not known:
            raise ValueError(f"{config.path}: there is no answer to measure. {' '.join(exclusions)}")
        records, num_answered = len(rows), len(known)
        scores |= compute_text_metrics(
            of_answers, [row["answer"] for row in known], [row["references"] for row in known]
        )
    return EvaluationResult(records, num_answered, tuple(exclusions), scores)


def describe_exclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which rows are not measured, as sentences."""
    bad = [row for row in rows if row["error"]]
    unreferenced = [row for row in rows if not row["error"] and not row["references"]]
    found = []
    if bad:
        found.append(f"{len(bad):,} of {len(rows):,} records could not be asked; the first is "
                     f"{bad[0]['source']!r}: {bad[0]['error']}")  # fmt: skip
    if unreferenced:
        found.append(f"{len(unreferenced):,} of {len(rows):,} records have neither a reply nor `answers` to hold an answer "
                     f"against; the first is {unreferenced[0]['source']!r}")  # fmt: skip
    return found


def load_supervised_dataset(model: VisionLanguageModel, config: SourceConfig, max_frames: int) -> SampleDataset:
    """The records of a file as training would read them; those that cannot be used are left out and listed.

    Raises:
        ValueError: none can.
    """
    data = DatasetConfig(
        **asdict(config), max_frames=max_frames, on_bad_sample="skip", over_length="skip", max_skipped=1.0
    )
    return load_dataset(data, SampleEncoder(model.processor, model.positions, truncate=False), evaluates=True)


def compute_losses(
    model: VisionLanguageModel, dataset: SampleDataset, *, batch_size: int, num_workers: int
) -> dict[str, Score]:
    """The measures of `loss_metrics`; that of the images with its interval."""
    with_images = torch.as_tensor(dataset.num_images) > 0
    sums, counts = sample_losses(model.model, _make_batches(model, dataset, "loss", batch_size, num_workers))
    blank = None
    if with_images.any():
        blank, _ = sample_losses(
            model.model,
            _make_batches(model, BlankImageDataset(dataset), "loss on blank images", batch_size, num_workers),
        )
    found = loss_metrics(sums, counts, blank, with_images)
    half = found.pop("image_gain_ci95", None)
    scores = {name: Score(value, None, None) for name, value in found.items()}
    if half is not None:
        gain = found["image_gain"]
        scores["image_gain"] = Score(gain, gain - half, gain + half)
    return scores


def _make_batches(
    model: VisionLanguageModel, dataset: Any, progress_label: str, batch_size: int, num_workers: int
) -> Iterator[dict[str, Any]]:
    loader = DataLoader(dataset, batch_size, collate_fn=Collator.of(model.processor), num_workers=num_workers)
    for batch in tqdm(loader, progress_label, unit="batch"):
        for one in batch.pop(SKIPPED_KEY, []):
            raise one.as_error()
        labels = batch["labels"].to(model.model.device)
        inputs = model.use_cached_features(on_device(batch, model.processor, model.model.device))
        yield {**inputs, "labels": labels}


def write_results(folder: Path, found: EvaluationResult, run_info: dict[str, Any]) -> None:
    """Write `results.json` and `results.md`: the measures, and what they are of."""
    write_json(folder, {
        **run_info, "records": found.records, "answered": found.num_answered, "left_out": list(found.exclusions),
        "metrics": scores_to_json(found.scores),
    })  # fmt: skip
    title = f"`{run_info['checkpoint']}` on `{run_info['data']}`, {found.records:,} records"
    parts = [
        title,
        tabulate(
            _make_cells(found.scores), ("metric", "value", "95% interval"), tablefmt="github", disable_numparse=True
        ),
        *found.exclusions,
    ]
    (folder / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _make_cells(scores: dict[str, Score]) -> list[tuple[str, str, str]]:
    def format_number(number: float | None) -> str:
        return "undefined" if number is None else f"{number:.4g}"

    return [
        (
            name,
            format_number(one.value),
            "" if one.low is None else f"{format_number(one.low)} to {format_number(one.high)}",
        )
        for name, one in scores.items()
    ]
