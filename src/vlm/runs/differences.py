"""What differs between the configurations of runs."""

from collections import Counter
from collections.abc import Mapping, Sequence

from vlm.runs.files import as_number, list_at, text_at
from vlm.runs.read import RunDirectory

PLACES = frozenset(
    f"trainer.{name}"
    for name in ("output_dir", "resume_from_checkpoint", "resume_changes", "hub_token", "run_name", "logging_dir")
)
"""Settings that say where a run is and how it is started, not what it does."""

SEED_KEYS = ("trainer.seed", "trainer.data_seed")
"""Settings that change only random numbers."""

SAME_EVALUATION_LOSS = {"distillation": "generation"}
"""Objective -> another one whose evaluation loss is the same quantity, though its training loss is not."""
HEAD_LOSS_WORDS = frozenset({"task", "loss", "loss_options", "class_weights", "label_smoothing", "weight"})
"""Words in keys of `model.head` that the loss of a head depends on."""
NOT_OF_THE_LOSS = "trainer.preference.reference"
"""The one key of `trainer.preference` that says how the loss is computed, and not what it is."""

MOST, MIN_FOR_MOST = 2 / 3, 4
"""The share of runs whose value counts as the usual one, and the minimum number of runs for this."""


def differing_settings(runs: Sequence[RunDirectory]) -> dict[str, list[object]]:
    """Return key -> its value in each run, for the settings that differ; None if a run does not have the key.

    For runs of the same recipe with the same version of this package, these are the keys that were set.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in PLACES)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if any(_differ(value, row[0]) for value in row[1:])}


def varied_settings(runs: Sequence[RunDirectory]) -> dict[str, list[object]]:
    """Return key -> its value in each run, for keys that commands set differently, or else as `differing_settings`.

    A setting that follows from another one, as those of a group do, is not named in addition.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key not in PLACES)
    values = {key: [setting_of(run, key) for run in runs] for key in keys}
    varied = {key: row for key, row in values.items() if any(_differ(value, row[0]) for value in row[1:])}
    return varied or differing_settings(runs)


def _differ(one: object, other: object) -> bool:
    numbers = as_number(one), as_number(other)
    return numbers[0] != numbers[1] if None not in numbers else repr(one) != repr(other)


def unusual_settings(runs: Sequence[RunDirectory]) -> list[dict[str, object]]:
    """Return for each run the settings from commands in which it differs from most runs of its recipe.

    If no value is that of most runs, all values are returned. Of a group that a run chose differently, only the choice
    is returned, and not the settings that follow from it.
    """
    by_recipe: dict[str | None, list[RunDirectory]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    usual: dict[str | None, dict[str, object]] = {}
    for recipe, group in by_recipe.items():
        keys = dict.fromkeys(key for run in group for key in run.overrides if key not in PLACES)
        usual[recipe] = {key: _usual_value([setting_of(run, key) for run in group]) for key in keys}
    return [_without_consequences(run, _unusual_values(run, usual[run.recipe])) for run in runs]


def _unusual_values(run: RunDirectory, usual: Mapping[str, object]) -> dict[str, object]:
    values = {key: setting_of(run, key) for key in usual}
    return {
        key: value
        for key, value in values.items()
        if _differ(value, usual[key]) and (value is not None or key in run.overrides)
    }


def _without_consequences(run: RunDirectory, values: Mapping[str, object]) -> dict[str, object]:
    """Return values without those of a group whose choice is among them; what the run itself set stays."""
    chosen = tuple(f"{_section_of(key)}." for key in values if key in run.overrides and key not in run.settings)
    return {key: value for key, value in values.items() if key in run.overrides or not key.startswith(chosen)}


def _section_of(group: str) -> str:
    """Return the section that a group of the command line fills: `trainer/lora` -> `trainer.lora`, `a@b.c` -> `b.c`."""
    name, _, package = group.partition("@")
    return package or name.replace("/", ".")


def setting_of(run: RunDirectory, key: str) -> object:
    """Return the value that a run has of a key of its command: a setting, or the choice of a group."""
    return run.settings.get(key, run.overrides.get(key))


def _usual_value(values: Sequence[object]) -> object:
    """Return the value that all, or most of many, have; a new object, which equals nothing, if there is none."""
    value, count = Counter(map(repr, values)).most_common(1)[0]
    if count == len(values) or (len(values) >= MIN_FOR_MOST and count > MOST * len(values)):
        return next(found for found in values if repr(found) == value)
    return object()


def are_comparable(one: RunDirectory, other: RunDirectory, metric: str) -> bool:
    """Return whether a logged metric is the same quantity in two runs, on the same data, as far as it is known.

    Losses of different objectives or heads are different quantities. Evaluation data are compared by their files: parts
    that two seeds split off the same files count as the same data.
    """
    is_loss = "loss" in metric or metric == "eval_image_gain"
    if is_loss and one.settings and other.settings and _loss_terms(one, metric) != _loss_terms(other, metric):
        return False
    if not metric.startswith("eval_"):
        return True
    source = metric.partition("/")[2]
    data = _evaluation_files(one, source), _evaluation_files(other, source)
    return data[0] == data[1] or not all(data)


def _loss_terms(run: RunDirectory, metric: str) -> tuple[object, ...]:
    """Return what the loss of a run is: its objective with its settings, and those of its heads."""
    settings = run.settings
    has_head = settings.get("model.head.task") is not None
    objective = str(settings.get("trainer.objective") or ("prediction" if has_head else "generation"))
    if metric.startswith("eval_"):
        objective = SAME_EVALUATION_LOSS.get(objective, objective)
    terms = {key: value for key, value in settings.items() if key.startswith(f"trainer.{objective}.")}
    terms.pop(NOT_OF_THE_LOSS, None)
    if has_head:
        heads = {key: value for key, value in settings.items() if key.startswith("model.head.")}
        terms |= {key: value for key, value in heads.items() if HEAD_LOSS_WORDS & set(key.split("."))}
    return objective, *sorted((key, repr(value)) for key, value in terms.items() if value is not None)


def _evaluation_files(run: RunDirectory, source: str) -> list[str]:
    """Return fingerprints of the files that a run was evaluated on, of one source if it is named; empty if unknown."""
    if "eval" not in run.data:
        return []
    sources = list_at(run.data, "eval", "sources") or list_at(run.data, "train", "sources")  # split off these
    files = [text_at(one, "fingerprint") for one in sources if source in ("", text_at(one, "source"))]
    return sorted(files) if all(files) else []
