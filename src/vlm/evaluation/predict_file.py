"""Predictions for a file of records, as a table, and metrics where the records have labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vlm.config.schema import SourceConfig
from vlm.data.cache import json_digest
from vlm.data.heads.labels import HeadLabels
from vlm.data.sample import BadSample, Sample
from vlm.evaluation.bootstrap import format_scores
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.inference.batch import Row, fill_table, format_media_paths, prompt_source
from vlm.inference.predict import Prediction, Predictor
from vlm.inference.resumable_table import ResumableTable, check_output


@dataclass(frozen=True)
class Predicted:
    """The predictions for a file of records.

    Attributes:
        records: number of records.
        bad: number of records that could not be read.
        metrics_text: metrics of the records with labels, as tables.
    """

    records: int
    bad: int
    metrics_text: str


def predict_file(
    predictor: Predictor, config: SourceConfig, output: Path, *, cache: Path, fingerprint: str, batch_size: int = 16,
    num_workers: int = 2, max_frames: int, overwrite: bool = False,
) -> Predicted:  # fmt: skip
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
    table = ResumableTable(
        output, make_column_names(predictor), json_digest(fingerprint, hash_heads(predictor), source.fingerprint)
    )
    rows = fill_table(
        table, source, predictor.processor, model.device, predictor.of, partial(make_row, predictor),
        progress_label="predicting", batch_size=batch_size, num_workers=num_workers, overwrite=overwrite,
    )  # fmt: skip
    return Predicted(len(rows), sum(bool(row["error"]) for row in rows), format_metrics(predictor, rows))


def hash_heads(predictor: Predictor) -> str:
    """Return a digest of heads and thresholds: a fingerprint of pieces of files may miss such small weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.heads.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return json_digest(digest.hexdigest(), predictor.model.config.heads)


def make_column_names(predictor: Predictor) -> list[str]:
    """Return the columns of a table: id, media, label if known, prediction, and why a record could not be read.

    With several heads, `label`, `score` and `prediction` end with `_` and the head's name.
    """
    heads = predictor.heads
    ends = [""] if len(heads) == 1 else [f"_{head.name}" for head in heads]
    columns = [f"{name}{end}" for end in ends for name in ("label", "score", "prediction")]
    return ["source", "image_path", *columns, "error"]


def make_row(
    predictor: Predictor, sample: Sample, predictions: dict[str, Prediction] | None, problem: BadSample | None
) -> Row:  # fmt: skip
    """Return a record's row; JSON lines also have the heads' `outputs` and the labels' `probabilities`."""
    row: Row = {"source": sample.id, "image_path": format_media_paths(sample, problem)}
    label = sample.label
    for head in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{head.name}"
        predicted = None if predictions is None else predictions[head.name]
        row |= {
            f"label{end}": label.get(head.name) if isinstance(label, dict) else label,
            f"score{end}": None if predicted is None else predicted.score,
            f"prediction{end}": None if predicted is None else predicted.prediction,
            f"probabilities{end}": {} if predicted is None else {str(k): v for k, v in predicted.probabilities.items()},
            f"outputs{end}": None if predicted is None else list(predicted.outputs),
        }
    return {**row, "error": "" if problem is None else problem.reason}


def target_or_error(labels: HeadLabels, value: object) -> list[float] | ValueError:
    """Return a label as numbers, or the error where the head does not know it."""
    try:
        return labels.target(value)
    except ValueError as error:
        return error


def format_metrics(predictor: Predictor, rows: Sequence[Row]) -> str:
    """Return tables of metrics over records with labels that a head knows, and how many labels it does not know."""
    tables = []
    for head in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{head.name}"
        known = [row for row in rows if row[f"label{end}"] is not None and not row["error"]]
        if not known or head.task == "pairwise":
            continue
        labels = HeadLabels(head.name, head.task, tuple(head.labels))
        converted = [target_or_error(labels, row[f"label{end}"]) for row in known]
        if unknown := [number for number, target in enumerate(converted) if isinstance(target, ValueError)]:
            first = unknown[0]
            tables.append(
                f"{len(unknown)} of {len(known)} labels are left out of the measures, the first is that of "
                f"{known[first]['source']}: {converted[first]}"
            )
        known = [row for row, target in zip(known, converted, strict=True) if not isinstance(target, ValueError)]
        if not known:
            continue
        targets = np.array([target for target in converted if not isinstance(target, ValueError)])
        outputs = np.array([row[f"outputs{end}"] for row in known])
        calibration = Calibration(head.temperature, head.threshold)
        metrics = scores(head.task, outputs, targets if head.task == "multilabel" else targets[:, 0], calibration)
        tables.append(f"{head.name} ({head.task}), {len(known):,} records with a label\n\n{format_scores(metrics)}")
    return "\n\n".join(tables)
