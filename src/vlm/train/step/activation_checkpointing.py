"""Activation checkpointing by part: which layers recompute their activations for the gradient.

Chen et al. 2016, arXiv:1604.06174. A layer that no gradient flows through keeps no activations, so recomputing them
would save nothing.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.config.schema import PARTS, TrainerOptions
from vlm.families.parts import get_part_names
from vlm.train.parts import Part


def enable_activation_checkpointing(
    model: PreTrainedModel, parts: Sequence[Part], trainer: TrainerOptions, args: TrainingArguments
) -> None:
    """Checkpoint the layers of some parts, as `trainer.activation_checkpointing` and its keys say.

    `args.activation_checkpointing` is false afterwards: `Trainer` would put it on every layer, and a gradient on the
    embeddings of language models that need none.

    Raises:
        ValueError: a named part keeps no activations, or its layers cannot be checkpointed.
    """
    if not args.activation_checkpointing:
        return
    named = trainer.checkpointed_parts
    with_gradient = parts_with_gradient(parts)
    if frozen := [name for name in named or () if name not in with_gradient]:
        raise ValueError(
            f"trainer.checkpointed_parts={named}: no gradient flows through the {frozen[0]}, so it stores no "
            f"activations; allowed are {', '.join(with_gradient) or 'none'}"
        )
    kwargs = args.activation_checkpointing_kwargs
    assert not isinstance(kwargs, str), "TrainingArguments parses text"
    options = dict(kwargs or {})
    every_n_layers = options.pop("every_n_layers", 1)
    offload = options.pop("offload", False)
    model.activation_checkpointing_enable({"use_reentrant": False, **options}, offload=offload)
    if not options.get("use_reentrant"):
        model.disable_input_require_grads()  # only reentrant checkpoints need it, and it lets gradients flow everywhere
    num_layers = _enable_checkpointed_layers(model, with_gradient if named is None else named, every_n_layers)
    args.activation_checkpointing = False
    if missing := [name for name in named or () if not num_layers[name]]:
        raise ValueError(
            f"trainer.checkpointed_parts={named}: the {missing[0]} has no layers that transformers can recompute; "
            "leave it out"
        )


def parts_with_gradient(parts: Sequence[Part]) -> list[str]:
    """Return the parts that gradients flow through: the first that trains, and all after it."""
    order = [part for part in parts if part.name in PARTS]
    trains = [any(parameter.requires_grad for parameter in part.parameters.values()) for part in order]
    return [part.name for index, part in enumerate(order) if any(trains[: index + 1])]


def _enable_checkpointed_layers(
    model: PreTrainedModel, requested: Sequence[str], every_n_layers: int
) -> dict[str, int]:
    """Leave checkpointing on at every n-th layer of the requested parts alone; return part -> number of layers."""
    names = get_part_names(model.config)
    num_layers: dict[str, int] = dict.fromkeys(PARTS, 0)
    for path, module in model.named_modules():
        if not hasattr(module, "gradient_checkpointing"):
            continue
        layer_parts = {names.part_of(f"{path}.{name}".removeprefix(".")) for name, _ in module.named_parameters()}
        enabled = bool(layer_parts) and layer_parts <= {*requested}
        if enabled and isinstance(module, GradientCheckpointingLayer):
            part = next(iter(layer_parts))
            enabled = num_layers[part] % every_n_layers == 0
            num_layers[part] += 1
        module.gradient_checkpointing = enabled
    return num_layers
