"""What a comparison leaves behind: `report.md`, `results.json`, the figure, and the records that got worse."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from vlm.data.sample import Sample
from vlm.evaluation.bootstrap import Score
from vlm.evaluation.comparison.changes import ALL, Change, compute_changes
from vlm.evaluation.comparison.drift import Drift, compute_drift
from vlm.evaluation.comparison.measure import Measured
from vlm.evaluation.comparison.plot import FIGURE_FILE, draw_changes
from vlm.evaluation.comparison.replay import ReplayProposal, name_of, propose_replay
from vlm.evaluation.comparison.worse import PAGE_FILE, WORSE_FILE, Worse, find_worse, write_worse
from vlm.evaluation.output import write_json

REPORT_FILE = "report.md"
HEADER = ("group", "records", "measure", "before", "after", "change [95%]", "better", "worse", "")
DIRECTIONS = {1: "better", 0: "", -1: "WORSE"}


@dataclass(frozen=True)
class Comparison:
    """Two models compared.

    Attributes:
        names: of the model before and of the one after.
        changes: the changes of all groups.
        drifts: the drift on each set of records.
        replay: the proposed share of replay.
        worse: the records that got worse.
        left_out: records that either model could not be used, by their ids, and why.
    """

    names: tuple[str, str]
    changes: list[Change]
    drifts: list[Drift]
    replay: ReplayProposal
    worse: list[Worse]
    left_out: list[tuple[str, str]]

    def __str__(self) -> str:
        """Return the summary for a terminal: groups, drift, and the proposal."""
        shown = [change for change in self.changes if not change.is_blank or change.split == "all"]
        parts = [
            tabulate(
                [HEADER, *map(_row, _without_repeats(shown))], "firstrow", tablefmt="plain", disable_numparse=True
            ),
            *map(_describe_drift, self.drifts),
            str(self.replay),
            *_describe_left_out(self.left_out),
        ]
        return "\n\n".join(parts)


def compare(
    names: tuple[str, str], before: Sequence[Measured], after: Sequence[Measured], metrics: Sequence[str]
) -> tuple[Comparison, list[int]]:
    """Return the comparison of two models from their rows on the same records, and the indices of those compared.

    Args:
        names: of the model before and of the one after.
        before: the rows of the model before.
        after: those of the model after, in the same order.
        metrics: metrics of answers to records of the user's; the first one counts where one number is needed.

    Raises:
        ValueError: the rows are not of the same records, no record could be asked, or a metric is not paired.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before):,} records before and {len(after):,} after: both models need the same records")
    rows = list(zip(before, after, strict=True))
    places = [place for place, pair in enumerate(rows) if not any(row.error for row in pair)]
    left_out = [(first.id, first.error or second.error) for first, second in rows if first.error or second.error]
    pairs = [rows[place] for place in places]
    if not pairs:
        raise ValueError(f"none of {len(rows):,} records could be used; the first: {left_out[0][1]}")
    changes = compute_changes(pairs, metrics)
    sets = dict.fromkeys(row.dataset for row, _ in pairs)
    drifts = [compute_drift(name, [pair for pair in pairs if pair[0].dataset == name]) for name in sets]
    worse = find_worse(pairs, metrics[0])
    return Comparison(names, changes, drifts, propose_replay(changes), worse, left_out), places


def write_comparison(
    comparison: Comparison, samples: Sequence[Sample], folder: Path, run_info: dict[str, object]
) -> None:
    """Write all files of a comparison.

    Args:
        comparison: what was compared.
        samples: the compared records, whose images are shown.
        folder: where to write.
        run_info: how it was made, for `results.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_changes(comparison.changes, folder / FIGURE_FILE)
    write_worse(comparison.worse, samples, folder)
    (folder / REPORT_FILE).write_text(_format_report(comparison), encoding="utf-8")
    before, after = comparison.names
    write_json(
        folder,
        {
            "before": before,
            "after": after,
            **run_info,
            "changes": [{**asdict(change), "direction": change.direction} for change in comparison.changes],
            "drift": [asdict(drift) for drift in comparison.drifts],
            "replay": {**asdict(comparison.replay), "text": str(comparison.replay)},
            "num_worse": len(comparison.worse),
            "left_out": [{"id": name, "error": error} for name, error in comparison.left_out],
        },
    )


def _format_report(comparison: Comparison) -> str:
    """Return `report.md`."""
    before, after = comparison.names
    clear = [change for change in comparison.changes if change.direction]
    number = sum(change.difference.low is not None for change in comparison.changes)
    parts = [
        "# What moved",
        f"From `{before}` to `{after}`.",
        f"![What moved]({FIGURE_FILE})",
        "## Replay",
        str(comparison.replay),
        "## Drift",
        *map(_describe_drift, comparison.drifts),
        "## Clear changes",
        f"{len(clear)} of {number} intervals do not include 0; of intervals without any change, 1 in 20 does so by "
        "chance. An interval of no width says that all records changed alike, or none did; in n records a change of up "
        "to 3/n could still be missed.",
        _table(clear),
        "## All groups",
        _table(comparison.changes),
        "## Records that got worse",
        f"{len(comparison.worse):,} records: [{PAGE_FILE}]({PAGE_FILE}), [{WORSE_FILE}]({WORSE_FILE}).",
        *_describe_left_out(comparison.left_out),
    ]
    return "\n\n".join(parts) + "\n"


def _table(changes: Sequence[Change]) -> str:
    if not changes:
        return "None."
    return tabulate(
        [HEADER, *map(_row, _without_repeats(changes))], "firstrow", tablefmt="github", disable_numparse=True
    )


def _without_repeats(changes: Sequence[Change]) -> list[Change]:
    """Return the changes without those of a group that is a whole set, as its only kind of question is."""
    sizes = {(row.dataset, row.measure, row.is_blank): row.num_records for row in changes if row.split == ALL}
    return [
        row
        for row in changes
        if row.split == ALL or row.num_records != sizes.get((row.dataset, row.measure, row.is_blank))
    ]


def _row(change: Change) -> tuple[str, ...]:
    images = ", blank images" if change.is_blank else ""
    return (
        f"{name_of(change)}{images}",
        f"{change.num_records:,}",
        change.measure,
        _number(change.before),
        _number(change.after),
        _difference(change.difference),
        str(change.num_better),
        str(change.num_worse),
        DIRECTIONS[change.direction],
    )


def _describe_drift(drift: Drift) -> str:
    """Return a sentence about a drift."""
    texts = {
        "what the model before writes costs the one after": drift.on_before,
        "what the model after writes costs the one before": drift.on_after,
    }
    known = [f"{text} {_difference(score)} nats more per token" for text, score in texts.items() if score is not None]
    same = f"{drift.same_answers:.0%} of {drift.num_records:,} answers are the same"
    return f"{drift.dataset}: {'; '.join([same, *known])}."


def _describe_left_out(left_out: Sequence[tuple[str, str]]) -> list[str]:
    if not left_out:
        return []
    name, error = left_out[0]
    return [f"{len(left_out):,} records were not compared; the first: {name!r}: {error}"]


def _difference(score: Score) -> str:
    if score.value is None:
        return "undefined"
    interval = "" if score.low is None or score.high is None else f" [{score.low:+.3f}, {score.high:+.3f}]"
    return f"{score.value:+.3f}{interval}"


def _number(value: float) -> str:
    return f"{value:.3f}"
