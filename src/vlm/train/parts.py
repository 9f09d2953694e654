"""Parts as parameter groups: which train, at which learning rate and weight decay, and the table that says so."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from vlm.config.schema import PARTS, TRAIN_FLAGS, ModelConfig, TrainerOptions


@dataclass(frozen=True)
class Part:
    """One part of a model, as this run treats it.

    Attributes:
        name: its name, which is its submodule's too.
        source: where it comes from: its Hub name or folder, a connector's name.
        module: the submodule.
        trains: whether its parameters train.
        learning_rate: its peak learning rate; None where it does not train.
        weight_decay: of its matrices.
    """

    name: str
    source: str
    module: nn.Module
    trains: bool
    learning_rate: float | None
    weight_decay: float


def split_parts(model: nn.Module, trainer: TrainerOptions, sources: ModelConfig) -> list[Part]:
    """The parts of a composed model with the run's settings for them."""
    named = {
        "visual_encoder": sources.visual_encoder.hf_name,
        "connector": sources.connector.name or sources.connector.type,
        "language_model": sources.language_model.hf_name,
    }
    return [
        Part(
            name=name,
            source=named[name],
            module=model.get_submodule(name),
            trains=trains(trainer, name),
            learning_rate=getattr(trainer.learning_rate, f"{name}_learning_rate") if trains(trainer, name) else None,
            weight_decay=getattr(trainer.weight_decay, f"{name}_weight_decay"),
        )
        for name in PARTS
    ]


def trains(trainer: TrainerOptions, part: str) -> bool:
    """Whether `trainer.unfreeze` lets a part train."""
    return getattr(trainer.unfreeze, TRAIN_FLAGS[part])


def freeze(parts: list[Part], unread: Collection[nn.Parameter] = ()) -> None:
    """Set every parameter's `requires_grad` as its part says; what the model never reads gets no gradient either."""
    for part in parts:
        part.module.requires_grad_(part.trains)
    for parameter in unread:
        parameter.requires_grad_(False)


def parameter_groups(parts: list[Part], decayed: Collection[str]) -> list[dict]:
    """Optimiser groups, one for each part that trains and each decay class.

    Args:
        parts: the model's parts.
        decayed: names (with the part's as prefix) of the parameters that weight decay applies to.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`; empty ones are left out.
    """
    groups = []
    for part in parts:
        named = [(f"{part.name}.{name}", p) for name, p in part.module.named_parameters() if p.requires_grad]
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
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in part.module.parameters()]  # ds_: ZeRO-3
        count, training = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        total += count
        trainable += training
        rate = f"{part.learning_rate:g}" if part.trains else "-"
        decay = f"{part.weight_decay:g}" if part.trains else "-"
        yield part.name, part.source, f"{count:,}", f"{training:,}", rate, decay
    yield "total", "", f"{total:,}", f"{trainable:,}", "", ""
