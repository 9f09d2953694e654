"""The heads of a checkpoint that a run trains further: which of their options the run may change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vlm.assembly.opening import opening
from vlm.config.model_schema import HeadConfig, HeadsConfig
from vlm.config.recorded import read_recipe
from vlm.models.configuration_prediction import VLMPredictionConfig

CHANGEABLE_HEAD_KEYS = (
    "loss",
    "loss_options",
    "class_weights",
    "label_smoothing",
    "weight",
    "threshold_by",
    "generation_weight",
)
"""Keys of a head that its weights do not depend on."""


def resolve_checkpoint_heads(
    requested: HeadsConfig, config: VLMPredictionConfig, checkpoint: str, overridden_keys: Sequence[str]
) -> HeadsConfig:
    """Return the checkpoint's heads with the run's training options; refuses other heads.

    `overridden_keys` are the keys below `head` that the command line sets.
    """
    if not requested.by_name:
        raise ValueError(
            f"trainer.from_pretrained={checkpoint}: it has prediction heads; choose a run with one, such as head-binary"
        )
    with opening(checkpoint, "the recipe in its config.json"):
        recorded = read_recipe(config.recipe).head
    labels = {head.name: head.labels or None for head in config.settings}
    _check_same_heads(requested, recorded, labels, checkpoint, overridden_keys)
    extra_heads = {
        name: replace(head, labels=labels[name], **_changeable_options(requested.extra_heads.get(name, head), head))
        for name, head in recorded.extra_heads.items()
    }
    return replace(
        recorded, labels=labels[recorded.name], extra_heads=extra_heads, **_changeable_options(requested, recorded)
    )


def _check_same_heads(
    requested: HeadsConfig,
    recorded: HeadsConfig,
    labels: Mapping[str, list[object] | None],
    checkpoint: str,
    overridden_keys: Sequence[str],
) -> None:
    """Raise ValueError if a run asks for a head that the checkpoint lacks, or has with other options."""
    pairs: list[tuple[str, str, HeadConfig, HeadConfig]] = [("", recorded.name, requested, recorded)]
    for name, head in requested.extra_heads.items():
        if name not in recorded.extra_heads:
            raise _fixed_heads_error(checkpoint, f"extra_heads.{name}", head.task, f"only {', '.join(labels)}")
        pairs.append((f"extra_heads.{name}.", name, head, recorded.extra_heads[name]))
    for prefix, name, head, recorded_head in pairs:
        for key, value in _requested_options(head, prefix, overridden_keys):
            allowed = [getattr(recorded_head, key)]
            if key == "labels":
                allowed.append(labels[name])
            if _without_nulls(value) not in map(_without_nulls, allowed):
                raise _fixed_heads_error(checkpoint, f"{prefix}{key}", value, allowed[-1])


def _requested_options(head: HeadConfig, prefix: str, overridden_keys: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Yield the options on which weights depend, if the run sets them, or they differ from the default."""
    defaults = type(head)()
    for key, value in vars(head).items():
        is_set = f"{prefix}{key}" in overridden_keys or _without_nulls(value) != getattr(defaults, key)
        if is_set and key not in (*CHANGEABLE_HEAD_KEYS, "extra_heads"):
            yield key, value


def _fixed_heads_error(checkpoint: str, key: str, requested: object, recorded: object) -> ValueError:
    return ValueError(
        f"trainer.from_pretrained={checkpoint}: its heads are fixed. You asked for model.head.{key}={requested}, but "
        f"it has {recorded}"
    )


def _changeable_options(requested: HeadConfig, recorded: HeadConfig) -> dict[str, object]:
    """Return the run's values of the options of a recorded head that a run may change."""
    return {key: getattr(requested, key) for key in CHANGEABLE_HEAD_KEYS if hasattr(recorded, key)}


def _without_nulls(value: object) -> object:
    """Return options without null values, which stand for the defaults of a class; any other value unchanged."""
    if not isinstance(value, dict):
        return value
    return {name: option for name, option in value.items() if option is not None}
