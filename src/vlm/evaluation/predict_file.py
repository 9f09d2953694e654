"""Predictions for a file of records, as a table, and metrics where the records have labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vlm.config.dataset_schema import SourceConfig
from vlm.data.cache import json_digest
from vlm.data.heads.labels import HeadLabels
from vlm.data.sample import BadSample, Sample
from vlm.evaluation.bootstrap import format_scores
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.inference.batch import Row, fill_table, format_media_paths, prompt_source
from vlm.inference.embed import Embedder
from vlm.inference.predict import Prediction, Predictor
from vlm.inference.resumable_table import ResumableTable, check_output
from vlm.models.configuration_prediction import HeadSettings


@dataclass(frozen=True)
class Predicted:
    """How many records a file has, how many of them could not be read, and metrics of those with labels, as tables."""

    records: int
    bad: int
    metrics_text: str


def predict_file(
    predictor: Predictor,
    config: SourceConfig,
    output: Path,
    *,
    cache: Path,
    fingerprint: str,
    batch_size: int = 16,
    num_workers: int = 2,
    max_frames: int,
    overwrite: bool = False,
) -> Predicted:
    """Predict every record of a file.

    Args:
        predictor: the model.
        config: where the records are and how to read them.
        output: a `.csv` or `.jsonl` file.
        cache: the folder of record indices.
        fingerprint: of the checkpoint.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        max_frames: the largest number of frames read from a video.
        overwrite: whether to replace an output that exists or was begun.

    Returns:
        The number of records, and metrics of those with labels.

    Raises:
        ValueError: the output exists, or was begun with other records, options or another checkpoint.
    """
    check_output(output, overwrite=overwrite)
    model = predictor.model
    source = prompt_source(
        model, predictor.processor, config, cache=cache, max_frames=max_frames, suffix=model.config.suffix_ids
    )
    names = ("label", "score", "prediction")
    columns = [f"{name}{end}" for _, end in heads_and_column_ends(predictor) for name in names]
    digest = json_digest(fingerprint, hash_heads(predictor), source.fingerprint)
    table = ResumableTable(output, ["source", "image_path", *columns, "error"], digest)
    rows = fill_table(
        table,
        source,
        model.device,
        predictor.of,
        partial(make_row, predictor),
        progress_label="predicting",
        batch_size=batch_size,
        num_workers=num_workers,
        overwrite=overwrite,
    )
    return Predicted(len(rows), sum(bool(row["error"]) for row in rows), format_metrics(predictor, rows))


def hash_heads(predictor: Predictor | Embedder) -> str:
    """Return a digest of heads and thresholds: a fingerprint of pieces of files may miss such small weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.heads.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return json_digest(digest.hexdigest(), predictor.model.config.heads)


def heads_and_column_ends(predictor: Predictor) -> list[tuple[HeadSettings, str]]:
    """Return the heads, each with the end of its columns' names: with several heads, `_` and the head's name."""
    heads = predictor.heads
    return [(head, "" if len(heads) == 1 else f"_{head.name}") for head in heads]


def make_row(
    predictor: Predictor, sample: Sample, predictions: dict[str, Prediction] | None, problem: BadSample | None
) -> Row:
    """Return a record's row; JSON lines also have the heads' `outputs` and the labels' `probabilities`."""
    row: Row = {"source": sample.id, "image_path": format_media_paths(sample, problem)}
    label = sample.label
    for head, end in heads_and_column_ends(predictor):
        predicted = None if predictions is None else predictions[head.name]
        row |= {
            f"label{end}": label.get(head.name) if isinstance(label, dict) else label,
            f"score{end}": None if predicted is None else predicted.score,
            f"prediction{end}": None if predicted is None else predicted.prediction,
            f"probabilities{end}": {} if predicted is None else {str(k): v for k, v in predicted.probabilities.items()},
            f"outputs{end}": None if predicted is None else list(predicted.outputs),
        }
    return {**row, "error": "" if problem is None else problem.reason}


def format_metrics(predictor: Predictor, rows: Sequence[Row]) -> str:
    """Return tables of metrics over records with labels that a head knows, and how many labels it does not know."""
    tables = []
    for head, end in heads_and_column_ends(predictor):
        if head.task == "pairwise":
            continue
        labelled = [row for row in rows if row[f"label{end}"] is not None and not row["error"]]
        labels = HeadLabels(head.name, head.task, tuple(head.labels))
        known, targets, unknown = [], [], []
        for row in labelled:
            try:
                target = labels.target(row[f"label{end}"])
            except ValueError as error:
                unknown.append(f"{row['source']}: {error}")
            else:
                targets.append(target)
                known.append(row[f"outputs{end}"])
        if unknown:
            left_out = f"{len(unknown)} of {len(labelled)} labels are excluded from the metrics"
            tables.append(f"{left_out}, the first is that of {unknown[0]}")
        if targets:
            numbers = np.array(targets) if head.task == "multilabel" else np.array(targets)[:, 0]
            metrics = scores(head.task, np.array(known), numbers, Calibration(head.temperature, head.threshold))
            tables.append(f"{head.name} ({head.task}), {len(known):,} records with a label\n\n{format_scores(metrics)}")
    return "\n\n".join(tables)
