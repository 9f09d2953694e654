"""What a run with prediction heads says at its end: measures with intervals, beside what no head would get; plots."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm.evaluation.bootstrap import format_scores, scores_to_json
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import baseline, confusion, scores
from vlm.evaluation.head_plots import plot_head_scores
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import CLASSIFICATION_TASKS
from vlm.train.heads.outputs import HeadOutputs
from vlm.train.run_directory import write_json

log = logging.getLogger(__name__)


def calibration_note(one: HeadSettings) -> str:
    """What was chosen for a head on the evaluation records; nothing for tasks without probabilities."""
    if one.task not in CLASSIFICATION_TASKS:
        return ""
    calibration = "temperature" if one.threshold is None else "temperature and threshold"
    return f"its {calibration} was chosen on these records, which flatters what depends on it"


def report(
    folder: Path, heads: Sequence[HeadSettings], train_targets: Mapping[str, np.ndarray], eval_outputs: Mapping[str, HeadOutputs],
    test_outputs: Mapping[str, HeadOutputs] | None, blank_outputs: Mapping[str, HeadOutputs] | None, *, out_of_fold: bool,
) -> None:  # fmt: skip
    """Write `scores.json` and the plots in `scores/`, and print the tables.

    Args:
        folder: the run directory.
        heads: the model's, as they were settled.
        train_targets: head -> `(N, width)`, what the records said that trained.
        eval_outputs: what they say of the records that temperature and threshold were chosen by.
        test_outputs: what they say of records that nothing was chosen by.
        blank_outputs: what they say of the last of these with blank pictures: do they use the picture at all?
        out_of_fold: whether `eval_outputs` was said by heads of folds.
    """
    sets = {
        "folds" if out_of_fold else "evaluation": eval_outputs,
        **({} if test_outputs is None else {"test": test_outputs}),
    }
    found: dict[str, dict] = {}
    for name, head_outputs in sets.items():
        for one in heads:
            output_dir = folder / "scores" / name / ("" if len(heads) == 1 else one.name)
            output_dir.mkdir(parents=True, exist_ok=True)
            note = "nothing was chosen by these records" if name == "test" else calibration_note(one)
            unseen = None if blank_outputs is None or name != list(sets)[-1] else blank_outputs[one.name]
            title = f"{name}: {one.name} ({one.task}), {len(head_outputs[one.name].targets):,} records"
            log.info("%s%s", title, f"; {note}" if note else "")
            found.setdefault(name, {})[one.name] = _score_head(
                one, train_targets[one.name], head_outputs[one.name], unseen, output_dir, note
            )
    write_json(folder / "scores.json", found)


def _score_head(
    one: HeadSettings, train_targets: np.ndarray, head_outputs: HeadOutputs, blank_outputs: HeadOutputs | None, output_dir: Path, note: str
) -> dict:  # fmt: skip
    """The measures of one head on one set of records, printed, drawn, and as JSON."""
    calibration = Calibration(one.temperature, one.threshold)
    known = train_targets[~np.isnan(train_targets).any(axis=1)]
    known = known if one.task == "multilabel" else known[:, 0]
    metrics = scores(
        one.task, head_outputs.outputs, head_outputs.targets, calibration, groups=head_outputs.ranking_groups
    )
    comparisons = {"baseline": baseline(one.task, known, head_outputs.targets, num_labels=len(one.labels))}
    if blank_outputs is not None:
        comparisons["blank pictures"] = scores(
            one.task, blank_outputs.outputs, blank_outputs.targets, calibration, groups=blank_outputs.ranking_groups
        )
    plot_head_scores(
        one.task,
        head_outputs.outputs,
        head_outputs.targets,
        calibration,
        [str(label) for label in one.labels],
        output_dir,
        groups=head_outputs.ranking_groups,
    )
    counts = confusion(one.task, head_outputs.outputs, head_outputs.targets, calibration, len(one.labels))
    log.info("\n%s\n\nPlots: %s\n", format_scores(metrics, comparisons), output_dir)
    return {
        "records": len(head_outputs.targets),
        "note": note,
        "temperature": one.temperature,
        "threshold": one.threshold,
        "scores": scores_to_json(metrics),
        **{name.replace(" ", "_"): scores_to_json(one) for name, one in comparisons.items()},
        "confusion": None if counts is None else counts.tolist(),
    }
