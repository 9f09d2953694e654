"""What a run with prediction heads says at its end: measures with intervals, beside what no head would get; plots."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm.evaluation.bootstrap import as_json, as_table
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import baseline, confusion, scores
from vlm.evaluation.head_plots import draw_scores
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_tasks import CLASSIFYING
from vlm.train.heads.trainer import Said
from vlm.train.run_directory import write_json

log = logging.getLogger(__name__)


def chosen_here(one: HeadSettings) -> str:
    """What was chosen for a head on the evaluation records; nothing for tasks without probabilities."""
    if one.task not in CLASSIFYING:
        return ""
    chosen = "temperature" if one.threshold is None else "temperature and threshold"
    return f"its {chosen} was chosen on these records, which flatters what depends on it"


def report(
    folder: Path, heads: Sequence[HeadSettings], train_targets: Mapping[str, np.ndarray], evaluated: Mapping[str, Said],
    tested: Mapping[str, Said] | None, blank: Mapping[str, Said] | None, *, out_of_folds: bool,
) -> None:  # fmt: skip
    """Write `scores.json` and the plots in `scores/`, and print the tables.

    Args:
        folder: the run directory.
        heads: the model's, as they were settled.
        train_targets: head -> `(N, width)`, what the records said that trained.
        evaluated: what they say of the records that temperature and threshold were chosen by.
        tested: what they say of records that nothing was chosen by.
        blank: what they say of the last of these with blank pictures: do they use the picture at all?
        out_of_folds: whether `evaluated` was said by heads of folds.
    """
    sets = {"folds" if out_of_folds else "evaluation": evaluated, **({} if tested is None else {"test": tested})}
    found: dict[str, dict] = {}
    for name, said in sets.items():
        for one in heads:
            where = folder / "scores" / name / ("" if len(heads) == 1 else one.name)
            where.mkdir(parents=True, exist_ok=True)
            note = "nothing was chosen by these records" if name == "test" else chosen_here(one)
            unseen = None if blank is None or name != list(sets)[-1] else blank[one.name]
            title = f"{name}: {one.name} ({one.task}), {len(said[one.name].targets):,} records"
            log.info("%s%s", title, f"; {note}" if note else "")
            found.setdefault(name, {})[one.name] = _measured(
                one, train_targets[one.name], said[one.name], unseen, where, note
            )
    write_json(folder / "scores.json", found)


def _measured(
    one: HeadSettings, train_targets: np.ndarray, said: Said, blank: Said | None, where: Path, note: str
) -> dict:  # fmt: skip
    """The measures of one head on one set of records, printed, drawn, and as JSON."""
    chosen = Calibration(one.temperature, one.threshold)
    known = train_targets[~np.isnan(train_targets).any(axis=1)]
    known = known if one.task == "multilabel" else known[:, 0]
    measured = scores(one.task, said.outputs, said.targets, chosen, groups=said.compared)
    beside = {"baseline": baseline(one.task, known, said.targets, num_labels=len(one.labels))}
    if blank is not None:
        beside["blank pictures"] = scores(one.task, blank.outputs, blank.targets, chosen, groups=blank.compared)
    draw_scores(
        one.task, said.outputs, said.targets, chosen, [str(label) for label in one.labels], where, groups=said.compared
    )
    counts = confusion(one.task, said.outputs, said.targets, chosen, len(one.labels))
    log.info("\n%s\n\nPlots: %s\n", as_table(measured, beside), where)
    return {
        "records": len(said.targets),
        "note": note,
        "temperature": one.temperature,
        "threshold": one.threshold,
        "scores": as_json(measured),
        **{name.replace(" ", "_"): as_json(one) for name, one in beside.items()},
        "confusion": None if counts is None else counts.tolist(),
    }
