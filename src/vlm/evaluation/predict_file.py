"""What prediction heads say of a file of records, as a table, and measures where the records have labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config.schema import SourceConfig
from vlm.data.cache import json_digest
from vlm.data.heads.labels import HeadLabels
from vlm.data.sample import BadSample, Sample
from vlm.evaluation.bootstrap import format_scores
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.inference.batch import fill_table, format_media_paths, prompt_source
from vlm.inference.predict import Prediction, Predictor
from vlm.inference.resumable_table import ResumableTable, check_output


@dataclass(frozen=True)
class Predicted:
    """What came of a file of records.

    Attributes:
        records: how many there are.
        bad: how many could not be read.
        measures: of those that have labels, as tables.
    """

    records: int
    bad: int
    metrics_text: str


def predict_file(
    predictor: Predictor, config: SourceConfig, output: Path, *, cache: Path, fingerprint: str, batch_size: int = 16,
    num_workers: int = 2, max_frames: int, overwrite: bool = False,
) -> "Predicted":  # fmt: skip
    """Predict every record of a file.

    Args:
        predictor: the model.
        config: the records and how they are read.
        output: a `.csv` or `.jsonl` file.
        cache: where indices of records are kept.
        fingerprint: of the checkpoint.
        batch_size: records at a time.
        num_workers: processes that read and decode images.
        max_frames: of a video.
        overwrite: whether what is there, or was begun, is replaced.

    Returns:
        How many records there were, and measures of those that have labels.

    Raises:
        ValueError: the output is there already, or was begun with something else.
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
        table, source, predictor.processor, model.device, predictor.of, partial(make_row, predictor), progress_label="predicting",
        batch_size=batch_size, num_workers=num_workers, overwrite=overwrite,
    )  # fmt: skip
    return Predicted(len(rows), sum(bool(row["error"]) for row in rows), format_metrics(predictor, rows))


def hash_heads(predictor: Predictor) -> str:
    """A name for a model's heads and what they decide by: they are too small for a fingerprint of pieces of files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.heads.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return json_digest(digest.hexdigest(), predictor.model.config.heads)


def make_column_names(predictor: Predictor) -> list[str]:
    """The columns of a table for a model's heads.

    What a record calls itself, its images, its label if it has one, what the head says, or why it could not be read.
    With several heads `label`, `score` and `prediction` are followed by `_` and a head's name.
    """
    heads = predictor.heads
    ends = [""] if len(heads) == 1 else [f"_{one.name}" for one in heads]
    own = [f"{name}{end}" for end in ends for name in ("label", "score", "prediction")]
    return ["source", "image_path", *own, "error"]


def make_row(
    predictor: Predictor, sample: Sample, found: dict[str, Prediction] | None, problem: BadSample | None
) -> dict[str, Any]:  # fmt: skip
    """A record's row; in JSON lines with the `outputs` of its heads and the `probabilities` of labels beside."""
    row: dict[str, Any] = {"source": sample.id, "image_path": format_media_paths(sample, problem)}
    label = sample.label
    for one in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{one.name}"
        said = None if found is None else found[one.name]
        row |= {
            f"label{end}": label.get(one.name) if isinstance(label, dict) else label,
            f"score{end}": None if said is None else said.score,
            f"prediction{end}": None if said is None else said.prediction,
            f"probabilities{end}": {} if said is None else {str(k): v for k, v in said.probabilities.items()},
            f"outputs{end}": None if said is None else list(said.outputs),
        }
    return {**row, "error": "" if problem is None else problem.reason}


def target_or_error(labels: HeadLabels, value: Any) -> list[float] | ValueError:
    """A label as numbers, or why the head does not know it."""
    try:
        return labels.target(value)
    except ValueError as error:
        return error


def format_metrics(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> str:
    """Measures of what was said of records that have labels that a head knows, as tables, and how many it does not."""
    tables = []
    for one in predictor.heads:
        end = "" if len(predictor.heads) == 1 else f"_{one.name}"
        known = [row for row in rows if row[f"label{end}"] is not None and not row["error"]]
        if not known or one.task == "pairwise":
            continue
        labels = HeadLabels(one.name, one.task, tuple(one.labels))
        said = [target_or_error(labels, row[f"label{end}"]) for row in known]
        if unknown := [number for number, target in enumerate(said) if isinstance(target, ValueError)]:
            tables.append(f"{len(unknown)} of {len(known)} labels are left out of the measures, the first is that of "
                          f"{known[unknown[0]]['source']}: {said[unknown[0]]}")  # fmt: skip
        known = [row for row, target in zip(known, said, strict=True) if not isinstance(target, ValueError)]
        if not known:
            continue
        targets = np.array([target for target in said if not isinstance(target, ValueError)])
        outputs = np.array([row[f"outputs{end}"] for row in known])
        chosen = Calibration(one.temperature, one.threshold)
        found = scores(one.task, outputs, targets if one.task == "multilabel" else targets[:, 0], chosen)
        tables.append(f"{one.name} ({one.task}), {len(known):,} records with a label\n\n{format_scores(found)}")
    return "\n\n".join(tables)
