"""The one number that a run is judged by, and whether the difference between settings is more than noise.

With several seeds per setting, noise is the spread between seeds: a pooled variance within settings, as in the analysis
of variance, and Student's t for the difference of two means. With one seed each, noise is that of the evaluation's
records: of the paired difference if both runs were evaluated on the same records, otherwise the logged intervals. This
leaves out what another seed would change. Otherwise the noise is unknown, and the result says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlm.config.derived import lower_is_better
from vlm.config.short_names import describe_values
from vlm.runs.differences import SEED_KEYS, are_comparable, setting_of, varied_settings
from vlm.runs.evaluated_records import EvaluatedRecords, paired_metric
from vlm.runs.files import as_number
from vlm.runs.read import RunDirectory

EVALUATION_LOSS, TRAINING_LOSS = "eval_loss", "loss"
SEEDS, PAIRED, INDEPENDENT = "seeds", "paired", "independent"
SOURCES = {
    SEEDS: "by the spread between seeds",
    PAIRED: "by the evaluation's records, which are the same",
    INDEPENDENT: "by the evaluation's intervals, taken for independent",
}
"""Source of the noise of a difference -> its name in messages."""


@dataclass(frozen=True)
class Outcome:
    """The value of a run's metric.

    Attributes:
        value: the metric of the best evaluation if the run keeps it, else of the last one.
        step: when it was measured.
        half_width: half the width of its 95% interval over records; None if it was not logged.
        metric: its name.
        records: what the evaluation found of each record; None if that was not kept.
    """

    value: float
    step: int
    half_width: float | None = None
    metric: str = ""
    records: EvaluatedRecords | None = None


def metric_of(runs: Sequence[RunDirectory]) -> str:
    """Return the metric for comparing runs: that of `trainer.keep_best`, else the loss of evaluation or training."""
    for run in runs:
        if isinstance(kept := run.settings.get("trainer.keep_best"), str):
            return f"eval_{kept.removeprefix('eval_')}"
    return EVALUATION_LOSS if any(EVALUATION_LOSS in run.metrics for run in runs) else TRAINING_LOSS


def sign_of(metric: str, runs: Sequence[RunDirectory] = ()) -> int:
    """Return 1 if more of a metric is better, -1 if less is; `trainer.greater_is_better` of a run decides."""
    for run in runs:
        kept, greater = run.settings.get("trainer.keep_best"), run.settings.get("trainer.greater_is_better")
        if isinstance(greater, bool) and isinstance(kept, str) and metric == f"eval_{kept.removeprefix('eval_')}":
            return 1 if greater else -1
    return -1 if lower_is_better(metric) else 1


def outcome_of(run: RunDirectory, metric: str) -> Outcome | None:
    """Return a run's value of a metric; None if it has none."""
    column = run.metrics.get(metric)
    if column is None or not column.values:
        return None
    place = len(column.values) - 1
    if isinstance(run.settings.get("trainer.keep_best"), str) and metric != TRAINING_LOSS:
        sign = sign_of(metric, [run])
        place = max(range(len(column.values)), key=lambda at: sign * column.values[at])
    step = column.steps[place]
    records = None if metric == TRAINING_LOSS else run.records_at(step)
    return Outcome(column.values[place], step, run.metrics.half_widths(metric).get(step), metric, records)


@dataclass
class Setting:
    """Runs that differ only in their seeds.

    Attributes:
        values: key -> value, for the keys that differ between settings.
        runs: the runs.
        outcomes: the outcomes of the runs that have one.
    """

    values: dict[str, object]
    runs: list[RunDirectory] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def __str__(self) -> str:
        return describe_values(self.values) or "all runs"

    @property
    def mean(self) -> float:
        """The mean of the outcomes; NaN without any."""
        return sum(one.value for one in self.outcomes) / len(self.outcomes) if self.outcomes else math.nan

    @property
    def squares(self) -> float:
        """The sum of squared deviations from the mean."""
        return sum((one.value - self.mean) ** 2 for one in self.outcomes)

    @property
    def deviation(self) -> float | None:
        """The standard deviation between seeds; None for fewer than two."""
        return math.sqrt(self.squares / (len(self.outcomes) - 1)) if len(self.outcomes) > 1 else None


@dataclass(frozen=True)
class Gap:
    """How far a setting is behind the best one.

    Attributes:
        setting: the setting.
        difference: the best one's mean minus its mean.
        half_width: half the width of the difference's 95% interval; None if the noise is unknown.
        source: the source of that noise, a key of `SOURCES`.
    """

    setting: Setting
    difference: float
    half_width: float | None
    source: str = SEEDS

    @property
    def is_clear(self) -> bool | None:
        """Whether the difference is more than noise; None if this is unknown."""
        return None if self.half_width is None else abs(self.difference) > self.half_width


def group_by_setting(runs: Sequence[RunDirectory], metric: str) -> list[Setting]:
    """Return the settings of runs with their outcomes, in the order of the runs."""
    differing = [key for key in varied_settings(runs) if key not in SEED_KEYS]
    settings: dict[str, Setting] = {}
    for run in runs:
        values = {key: setting_of(run, key) for key in differing}
        setting = settings.setdefault(repr(values), Setting(values))
        setting.runs.append(run)
        if (outcome := outcome_of(run, metric)) is not None:
            setting.outcomes.append(outcome)
    return list(settings.values())


def rank(settings: Sequence[Setting], sign: int) -> tuple[Setting | None, list[Gap]]:
    """Return the best setting, and how far each other one is behind it, the nearest first.

    Args:
        settings: the settings; those without an outcome are left out.
        sign: 1 if more is better.
    """
    measured = sorted((one for one in settings if one.outcomes), key=lambda one: -sign * one.mean)
    if not measured:
        return None, []
    best, *others = measured
    noise = _seed_noise(measured) or _record_noise
    return best, [Gap(other, best.mean - other.mean, *noise(best, other)) for other in others]


def _seed_noise(settings: Sequence[Setting]) -> Callable[[Setting, Setting], tuple[float, str]] | None:
    """Return half the width of a difference's interval from the spread between seeds; None without a spread."""
    freedom = sum(len(one.outcomes) - 1 for one in settings)
    if freedom < 1:
        return None
    variance = sum(one.squares for one in settings) / freedom

    def half_width(one: Setting, other: Setting) -> tuple[float, str]:
        """Return it for two settings, and its source."""
        from scipy.stats import t  # slow to import

        error = math.sqrt(variance * (1 / len(one.outcomes) + 1 / len(other.outcomes)))
        return float(t.ppf(0.975, freedom)) * error, SEEDS

    return half_width


def _record_noise(one: Setting, other: Setting) -> tuple[float | None, str]:
    """Return half the width of the interval of a difference over records, and whether these are the same."""
    first, second = one.outcomes[0], other.outcomes[0]
    pair = paired_metric(first.records, second.records, first.metric)
    if pair is not None and pair.low is not None and pair.high is not None:
        return (pair.high - pair.low) / 2, PAIRED
    widths = first.half_width, second.half_width
    return None if widths[0] is None or widths[1] is None else math.hypot(widths[0], widths[1]), INDEPENDENT


def describe_verdict(settings: Sequence[Setting], metric: str, sign: int, *, in_sweep: bool = False) -> str:
    """Return in a few sentences which setting is best, and whether that is more than noise; else what would tell.

    Args:
        settings: the settings.
        metric: what they are compared by.
        sign: 1 where more is better.
        in_sweep: whether the runs are those of a sweep.
    """
    best, gaps = rank(settings, sign)
    if best is None:
        return f"No run has a value of {metric}, so none is best."
    measured = [run for one in settings for run in one.runs if metric in run.metrics]
    if not all(are_comparable(measured[0], run, metric) for run in measured[1:]):
        return (
            f"{metric} is not comparable: the runs have different objectives or heads, or other settings of their "
            "losses, or different evaluation data."
        )
    which = "highest" if sign > 0 else "lowest"
    text = f"Best by {metric} ({which}): {best}, {_describe_mean(best)}."
    if metric == TRAINING_LOSS:
        text += " This is the loss of the last batches of training, since nothing was evaluated."
    if not best.values:
        return f"{_describe_unvaried(best, metric)} {_advise_variation(in_sweep=in_sweep)}"
    if not gaps:
        return f"{text} There is no other setting to compare it with."
    nearest = gaps[0]
    if nearest.half_width is None:
        return (
            f"{text} The next, {nearest.setting}, is {abs(nearest.difference):.4g} behind. Whether that is more than "
            f"noise cannot be told from one seed of each: {_advise(metric, in_sweep=in_sweep)}."
        )
    low, high = sorted((abs(nearest.difference) - nearest.half_width, abs(nearest.difference) + nearest.half_width))
    interval = f"{abs(nearest.difference):.4g} behind [95%: {low:.4g} to {high:.4g}], {SOURCES[nearest.source]}"
    if nearest.is_clear:
        untold = "" if nearest.source == SEEDS else " Each has one seed; what another would change is not known."
        return f"{text} The next, {nearest.setting}, is {interval}: that is more than noise.{untold}"
    unclear = sum(gap.is_clear is False for gap in gaps)
    more = "" if unclear == 1 else f" {unclear} settings cannot be told from the best."
    return f"{text} The next, {nearest.setting}, is {interval}: that is within noise.{more}"


def _describe_unvaried(setting: Setting, metric: str) -> str:
    """Return what runs of the same settings came to."""
    number = len(setting.runs)
    which = "There is one run to compare" if number == 1 else f"Nothing was varied but the seed in {number} runs"
    return f"{which}: {metric} is {_describe_mean(setting)}."


def _advise_variation(*, in_sweep: bool) -> str:
    example = "trainer.learning_rate.connector_learning_rate=1e-4,1e-3"
    if in_sweep:
        return f"To vary a setting, give it several values, separated by commas: {example}."
    return f"To compare settings, give runs different ones, such as {example.partition(',')[0]}."


def _advise(metric: str, *, in_sweep: bool) -> str:
    """Return what would tell whether the difference of settings with one seed each is noise."""
    seeds = "add trainer.seed=1,2,3 to the sweep" if in_sweep else "train each with several values of trainer.seed"
    if metric != TRAINING_LOSS:
        return seeds
    return f"evaluate (dataset.eval_split=0.05 trainer.eval_strategy=epoch), or {seeds}"


def _describe_mean(setting: Setting) -> str:
    number = len(setting.outcomes)
    if setting.deviation is not None:
        return f"{setting.mean:.4g} ± {setting.deviation:.2g} over {number} seeds"
    width = setting.outcomes[0].half_width
    return f"{setting.mean:.4g}" + (f" ± {width:.2g}" if width is not None else "")


def numeric_axis(settings: Sequence[Setting]) -> tuple[str, list[float]] | None:
    """Return the one key that differs between settings and its numbers; None if several do, or it has none."""
    keys: Mapping[str, object] = settings[0].values if settings else {}
    if len(keys) != 1:
        return None
    key = next(iter(keys))
    numbers = [as_number(one.values[key]) for one in settings]
    return (key, [number for number in numbers if number is not None]) if None not in numbers else None
