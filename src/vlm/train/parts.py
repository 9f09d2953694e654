"""Parts as parameter groups: which train, at which learning rate and weight decay, and the table that says so."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vlm.config.schema import PARTS, TRAIN_FLAGS, ModelConfig, TrainerOptions
from vlm.families.table import part_names


@dataclass(frozen=True)
class Part:
    """One part of a model, as this run treats it.

    Attributes:
        name: its name.
        source: where it comes from: its Hub name or folder, a connector's name.
        parameters: its parameters, by their full names in the model.
        trains: whether they train.
        learning_rate: its peak learning rate; None where it does not train.
        weight_decay: of its matrices.
        unread: full names of those that no answer depends on, and that never get a gradient.
    """

    name: str
    source: str
    parameters: dict[str, nn.Parameter]
    trains: bool
    learning_rate: float | None
    weight_decay: float
    unread: frozenset[str] = frozenset()


def split_parts(model: nn.Module, trainer: TrainerOptions, sources: ModelConfig) -> list[Part]:
    """The parts of a model with the run's settings for them; every parameter belongs to exactly one."""
    names = part_names(model.config)
    named = {
        "visual_encoder": sources.visual_encoder.hf_name,
        "connector": sources.connector.name or sources.connector.type,
        "language_model": sources.language_model.hf_name,
    }
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parameters[names.part_of(name)][name] = parameter
    return [
        Part(
            name=name,
            source=named[name],
            parameters=parameters[name],
            trains=trains(trainer, name),
            learning_rate=getattr(trainer.learning_rate, f"{name}_learning_rate") if trains(trainer, name) else None,
            weight_decay=getattr(trainer.weight_decay, f"{name}_weight_decay"),
            unread=frozenset(filter(names.is_unread, parameters[name])),
        )
        for name in PARTS
    ]


def trains(trainer: TrainerOptions, part: str) -> bool:
    """Whether `trainer.unfreeze` lets a part train."""
    return getattr(trainer.unfreeze, TRAIN_FLAGS[part])


def freeze(parts: list[Part]) -> None:
    """Set every parameter's `requires_grad` as its part says; what no answer depends on gets no gradient either."""
    for part in parts:
        for name, parameter in part.parameters.items():
            parameter.requires_grad_(part.trains and name not in part.unread)


def cast(model: nn.Module, parts: list[Part], trained: torch.dtype, frozen: torch.dtype) -> None:
    """Give the parts that train one precision and the others another, their saved buffers included.

    Buffers that no checkpoint holds stay as their modules made them: rotary frequencies lose too much in half
    precision.
    """
    names = part_names(model.config)
    dtypes = {part.name: trained if part.trains else frozen for part in parts}
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in [*model.named_parameters(), *buffers]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[names.part_of(name)])


def parameter_groups(parts: list[Part], decayed: Collection[str]) -> list[dict]:
    """Optimiser groups, one for each part that trains and each decay class.

    Args:
        parts: the model's parts.
        decayed: full names of the parameters that weight decay applies to.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`; empty ones are left out.
    """
    groups = []
    for part in parts:
        named = [(name, p) for name, p in part.parameters.items() if p.requires_grad]
        for label, decay in (("decay", part.weight_decay), ("no_decay", 0.0)):
            params = [p for name, p in named if (name in decayed) == (label == "decay")]
            if params:
                groups.append(
                    {"name": f"{part.name}.{label}", "params": params, "lr": part.learning_rate, "weight_decay": decay}
                )
    return groups


def table(parts: list[Part]) -> str:
    """The table that a run begins with, once `freeze` has settled what trains."""
    rows = [("part", "from", "parameters", "trainable", "learning rate", "weight decay"), *_rows(parts)]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rows(parts: list[Part]) -> Iterator[tuple[str, ...]]:
    total = trainable = 0
    for part in parts:
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in part.parameters.values()]  # ds_: ZeRO-3
        count, training = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        total += count
        trainable += training
        rate = f"{part.learning_rate:g}" if part.trains else "-"
        decay = f"{part.weight_decay:g}" if part.trains else "-"
        yield part.name, part.source, f"{count:,}", f"{training:,}", rate, decay
    yield "total", "", f"{total:,}", f"{trainable:,}", "", ""
