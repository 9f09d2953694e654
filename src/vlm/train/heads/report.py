"""The report at the end of a run with heads: metrics with intervals, beside those of a constant answer; plots."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vlm.evaluation.bootstrap import Score, format_scores, scores_to_json
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import baseline, confusion, scores
from vlm.evaluation.head_plots import plot_head_scores
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import CLASSIFICATION_TASKS
from vlm.runs.evaluated_records import RESAMPLES_FILE, resamples_as_json
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.heads.outputs import HeadOutputs
from vlm.train.run_directory import write_json

log = logging.getLogger(__name__)

COMPARISON_KEYS = {"baseline": "baseline", "blank images": "blank_pictures"}
"""Column of the table -> key of `scores.json`."""


def report(
    folder: Path,
    heads: Sequence[HeadSettings],
    train_targets: Mapping[str, np.ndarray],
    sets: Mapping[str, Mapping[str, HeadOutputs]],
    blank_outputs: Mapping[str, HeadOutputs] | None,
    identities: Mapping[str, str],
) -> None:
    """Write `scores.json`, `scores_resampled.json` and the plots in `scores/`, and print the tables.

    Args:
        folder: the run directory.
        heads: the model's heads, calibrated.
        train_targets: head -> `(N, width)`, the targets of the records that trained.
        sets: outputs for the records that temperature and threshold were chosen by, named `evaluation` or `folds`;
            then, named `test`, those for records that nothing was chosen by, if there are any.
        blank_outputs: outputs for the last set with blank images: do the heads use the images at all?
        identities: set -> a digest of its records, see `identify_records`.
    """
    report_json: dict[str, dict[str, object]] = {}
    resamples: dict[str, dict[str, object]] = {}
    for name, head_outputs in sets.items():
        is_last = name == list(sets)[-1]
        for head in heads:
            output_dir = folder / "scores" / name / ("" if len(heads) == 1 else head.name)
            output_dir.mkdir(parents=True, exist_ok=True)
            outputs, note = head_outputs[head.name], _note(name, head)
            blank = blank_outputs[head.name] if blank_outputs is not None and is_last else None
            title = f"{name}: {head.name} ({head.task}), {len(outputs.targets):,} records"
            log.info("%s%s", title, f"; {note}" if note else "")
            metrics, head_json = _score_head(head, train_targets[head.name], outputs, blank, output_dir)
            resamples.setdefault(name, {})[head.name] = resamples_as_json(outputs.identify(identities[name]), metrics)
            report_json.setdefault(name, {})[head.name] = {"records": len(outputs.targets), "note": note, **head_json}
    write_json(folder / "scores.json", report_json)
    write_text_whole(folder / RESAMPLES_FILE, f"{json.dumps(resamples)}\n")


def _note(name: str, head: HeadSettings) -> str:
    """Return what was chosen by the records of a set; empty for tasks without probabilities.

    Evaluations while a run trains measure probabilities at temperature 1, before anything is chosen. Among the
    probabilities of several classes a temperature changes the order of records, and with it `auroc`.
    """
    if name == "test":
        return "nothing was tuned on these records"
    if head.task not in CLASSIFICATION_TASKS:
        return ""
    calibration = "temperature" if head.threshold is None else "temperature and threshold"
    chosen = f"{calibration} tuned on these records: scores that depend on this are optimistic"
    if name != "evaluation" or head.temperature == 1:
        return chosen
    which = (
        "; auroc and average_precision depend on it, too" if head.task == "multiclass" and len(head.labels) > 2 else ""
    )
    return f"{chosen}, and differ from those of the log, which are at temperature 1 (now {head.temperature:.3g}){which}"


def _score_head(
    head: HeadSettings, train_targets: np.ndarray, outputs: HeadOutputs, blank: HeadOutputs | None, output_dir: Path
) -> tuple[dict[str, Score], dict[str, object]]:
    """Print and plot the metrics of one head on one set of records; return them, and the same as JSON with others."""
    calibration = Calibration(head.temperature, head.threshold)
    known = train_targets[~np.isnan(train_targets).any(axis=1)]
    known = known if head.task == "multilabel" else known[:, 0]
    measure = partial(scores, head.task, calibration=calibration)
    metrics = measure(outputs.outputs, outputs.targets, groups=outputs.ranking_groups)
    comparisons = {"baseline": baseline(head.task, known, outputs.targets, num_labels=len(head.labels))}
    if blank is not None:
        comparisons["blank images"] = measure(blank.outputs, blank.targets, groups=blank.ranking_groups)
    plot_head_scores(
        head.task,
        outputs.outputs,
        outputs.targets,
        calibration,
        [str(label) for label in head.labels],
        output_dir,
        groups=outputs.ranking_groups,
    )
    counts = confusion(head.task, outputs.outputs, outputs.targets, calibration, len(head.labels))
    log.info("\n%s\n\nPlots: %s\n", format_scores(metrics, comparisons), output_dir)
    return metrics, {
        "temperature": head.temperature,
        "threshold": head.threshold,
        "scores": scores_to_json(metrics),
        **{COMPARISON_KEYS[name]: scores_to_json(compared) for name, compared in comparisons.items()},
        "confusion": None if counts is None else counts.tolist(),
    }
