"""Parts as parameter groups: which train, at which learning rate and weight decay, and the table that says so."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel

from vlm.assembly.encoders import encoder_sources
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.model_kinds import is_prediction_model
from vlm.config.model_schema import ConnectorConfig, ModelConfig
from vlm.config.packaged import packaged_connectors
from vlm.config.schema import HEAD, PARTS, TRAIN_FLAGS, TrainerOptions
from vlm.families.parts import get_part_names
from vlm.models.vocabulary import find_vocabulary_head
from vlm.train.layer_decay import rate_factors
from vlm.train.lora import is_trained_with_adapter

FINAL_NORMS = frozenset({"norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f"})
"""Names of the norm after a language model's last layer, which earlier hidden states do not pass through."""


@dataclass(frozen=True)
class Part:
    """One part of a model, as this run treats it.

    Attributes:
        name: the part's name.
        source: where the part comes from: a Hub name or folder, a connector's name.
        parameters: full name in the model -> parameter.
        is_unfrozen: whether all parameters train.
        learning_rate: the configured peak learning rate, also where nothing trains; there it may be None.
        weight_decay: the weight decay of matrices.
        unread: full names of parameters that no answer depends on, and that never get a gradient.
        rank: the rank of the part's adapter; None where it has none.
        adapter: full names of what trains although the part is frozen: its adapter, perhaps biases.
        rows: full names of embeddings of which only the rows `new_tokens` train, while the part is frozen.
        new_tokens: the numbers of those rows.
        rate_factors: the factor from `learning_rate` to that of each parameter, where layers differ; empty: 1.
    """

    name: str
    source: str
    parameters: dict[str, nn.Parameter]
    is_unfrozen: bool
    learning_rate: float | None
    weight_decay: float
    unread: frozenset[str] = frozenset()
    rank: int | None = None
    adapter: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    new_tokens: tuple[int, ...] = ()
    rate_factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_trainable(self) -> bool:
        """Whether the part trains: as a whole, through an adapter or in rows of its embeddings."""
        return self.is_unfrozen or bool(self.adapter) or bool(self.rows)


def make_parts(
    model: TrainableModel,
    trainer: TrainerOptions,
    sources: ModelConfig,
    new_tokens: Sequence[int] = (),
    unused_forms: Sequence[str] = (),
) -> list[Part]:
    """Return the parts of a model with the run's settings; every parameter belongs to exactly one part.

    Args:
        model: the model.
        trainer: the run's settings.
        sources: where the model's parts come from.
        new_tokens: ids whose embeddings train even where the language model does not.
        unused_forms: what the forms of parameters begin with that get no gradient, as the family's trial has found.
    """
    names = get_part_names(model.config, unused_forms)
    unread = parameters_unread_by_heads(model)
    part_names = (*PARTS, HEAD) if is_prediction_model(model) else PARTS
    source_names = {
        "visual_encoder": " + ".join(encoder.hf_name for encoder in encoder_sources(sources.visual_encoder).values()),
        "connector": connector_source(sources.connector),
        "language_model": sources.language_model.hf_name,
        HEAD: ", ".join(f"{head.task} at {head.pooling}" for head in sources.head.by_name.values()),
    }
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in part_names}
    for name, parameter in model.named_parameters():
        parameters[names.part_of(name)][name] = parameter
    has_new_rows = bool(new_tokens) and not is_unfrozen(trainer, "language_model")
    rows = token_embedding_names(model) - unread if has_new_rows else frozenset()
    adapted = {name for name, _ in model.named_parameters() if is_trained_with_adapter(name, trainer.lora)}
    ranks = {part: getattr(trainer.lora, part).r for part in PARTS}
    own_sizes = {name: {key: _num_elements(p) for key, p in own.items()} for name, own in parameters.items()}
    decays = {name: getattr(trainer.learning_rate, f"{name}_layer_decay", None) for name in parameters}
    modules = dict(model.named_modules())
    return [
        Part(
            name=name,
            source=source_names[name],
            parameters=own,
            is_unfrozen=is_unfrozen(trainer, name),
            learning_rate=getattr(trainer.learning_rate, f"{name}_learning_rate"),
            weight_decay=getattr(trainer.weight_decay, f"{name}_weight_decay"),
            unread=unread.union(filter(names.is_unused, own)) & own.keys(),
            rank=ranks.get(name),
            adapter=frozenset() if ranks.get(name) is None else frozenset(own.keys() & adapted),
            rows=rows & own.keys(),
            new_tokens=tuple(new_tokens),
            rate_factors=rate_factors(modules, own_sizes[name], decays[name], name),
        )
        for name, own in parameters.items()
    ]


def connector_source(connector: ConnectorConfig) -> str:
    """Return what the table of parts calls a connector: its name, unless that is the packaged one of another type."""
    is_other = connector.name in packaged_connectors() and connector.name != connector.type
    return connector.type if connector.name is None or is_other else connector.name


def token_embedding_names(model: TrainableModel) -> frozenset[str]:
    """Return full names of the matrices with a row for each token: embeddings, and untied vocabulary heads."""
    layers = [model.get_input_embeddings(), find_vocabulary_head(model)]
    weights = {id(layer.weight) for layer in layers if layer is not None}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in weights)


def parameters_unread_by_heads(model: TrainableModel) -> frozenset[str]:
    """Return full names of what no head depends on: later layers, an untied vocabulary head if no reply is learned."""
    if not is_prediction_model(model) or model.config.generation_weight:
        return frozenset()
    vocabulary, embeddings = find_vocabulary_head(model), model.get_input_embeddings()
    unread = [] if vocabulary is None else [p for p in vocabulary.parameters() if p is not embeddings.weight]
    depth = model.config.get_text_config().num_hidden_layers
    last = max(depth if head.layer is None else head.layer % (depth + 1) for head in model.config.settings)
    if last < depth:
        unread += [parameter for module in _modules_after_layer(model, last) for parameter in module.parameters()]
    ids = set(map(id, unread))
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in ids)


def _modules_after_layer(model: TrainableModel, layer: int) -> list[nn.Module]:
    """Return the language model's modules after a hidden state; state 0 is before the first layer."""
    depth = model.config.get_text_config().num_hidden_layers
    children = dict(model.get_decoder().named_children())
    stacks = [child for child in children.values() if isinstance(child, nn.ModuleList) and len(child) == depth]
    norms = [children[name] for name in FINAL_NORMS & children.keys()]
    return [*(module for stack in stacks for module in stack[layer:]), *norms]


def is_unfrozen(trainer: TrainerOptions, part: str) -> bool:
    """Return whether `trainer.unfreeze` lets a part train; a head always does."""
    return part == HEAD or getattr(trainer.unfreeze, TRAIN_FLAGS[part])


def freeze(parts: list[Part]) -> None:
    """Set every parameter's `requires_grad` as its part says; parameters that no answer depends on get no gradient.

    Where only the new rows of embeddings train, the gradient of all other rows is 0: without weight decay, which these
    embeddings do not get, no optimiser moves them.
    """
    for part in parts:
        for name, parameter in part.parameters.items():
            trains = part.is_unfrozen or name in part.adapter or name in part.rows
            parameter.requires_grad_(trains and name not in part.unread)
            if name in part.rows:
                parameter.register_hook(partial(_keep_gradient_rows, part.new_tokens))


def _keep_gradient_rows(rows: Sequence[int], gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient `(vocabulary, D)` that is 0 except in these rows."""
    masked = torch.zeros_like(gradient)
    masked[list(rows)] = gradient[list(rows)]
    return masked


def cast(model: PreTrainedModel, parts: list[Part], trained: torch.dtype, frozen: torch.dtype) -> None:
    """Cast parts and adapters that train to one precision and the others to another, with their saved buffers.

    Buffers that no checkpoint holds keep their precision: rotary frequencies lose too much in half precision.
    """
    names = get_part_names(model.config)
    dtypes = {part.name: trained if part.is_unfrozen else frozen for part in parts}
    adapters = frozenset[str]().union(*(part.adapter | part.rows for part in parts))
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in [*model.named_parameters(), *buffers]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(trained if name in adapters else dtypes[names.part_of(name)])


def parameter_groups(parts: list[Part], decayed: Collection[str]) -> list[dict]:
    """Return the optimiser's groups, one for each part that trains, each decay class and each learning rate.

    A group has `name`, `params`, `lr` and `weight_decay`. Weight decay applies to the parameters named in `decayed`.
    """
    groups = []
    for part in parts:
        named: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in part.parameters.items():
            if parameter.requires_grad:
                is_decayed = name in decayed and name not in part.rows
                named.setdefault((part.rate_factors.get(name, 1.0), is_decayed), []).append(parameter)
        for (factor, is_decayed), params in sorted(named.items(), key=lambda item: item[0], reverse=True):
            label = ("decay" if is_decayed else "no_decay") + ("" if factor == 1 else f".{factor:.3g}")
            rate, decay = part.learning_rate, part.weight_decay if is_decayed else 0.0
            rate = rate if rate is None else rate * factor
            groups.append({"name": f"{part.name}.{label}", "params": params, "lr": rate, "weight_decay": decay})
    return groups


def table(parts: list[Part]) -> str:
    """Return the table of parts that a run logs first; `freeze` has to come before."""
    rows = [("part", "from", "parameters", "trainable", "learning rate", "weight decay"), *_table_rows(parts)]
    alignment = ("left", "left", "right", "right", "right", "right")
    header, *lines = tabulate(rows, tablefmt="plain", colalign=alignment, disable_numparse=True).splitlines()
    return "\n".join([header, "-" * len(header), *lines])


def _table_rows(parts: list[Part]) -> Iterator[tuple[str, ...]]:
    described = [describe(part) for part in parts]
    for part in described:
        how = f"{part['how']}: " if part["how"] else ""
        rate, decay = (f"{part[key]:g}" if part["trains"] else "-" for key in ("learning_rate", "weight_decay"))
        yield part["name"], part["source"], f"{part['parameters']:,}", f"{how}{part['trained']:,}", rate, decay
    total, trained = (sum(part[key] for part in described) for key in ("parameters", "trained"))
    yield "total", "", f"{total:,}", f"{trained:,}", "", ""


def describe(part: Part) -> dict:
    """Return a part for a table or a file; `freeze` has to come before.

    It has `name`, `source`, the numbers of `parameters` and of those that are `trained`, `how` they train where it is
    not as a whole, whether the part `trains`, its `learning_rate` and `weight_decay`.
    """
    sizes = {name: _num_elements(parameter) for name, parameter in part.parameters.items()}
    trained = sum(sizes[name] for name, p in part.parameters.items() if p.requires_grad and name not in part.rows)
    trained += sum(_row_width(part.parameters[name]) * len(part.new_tokens) for name in part.rows)
    return {
        "name": part.name,
        "source": part.source,
        "parameters": sum(sizes.values()),
        "trained": trained,
        "how": f"LoRA r={part.rank}" if part.adapter else "new tokens" if part.rows else "",
        "trains": part.is_trainable,
        "learning_rate": part.learning_rate,
        "weight_decay": part.weight_decay,
    }


def _row_width(matrix: nn.Parameter) -> int:
    """Return the width of a matrix, which ZeRO-3 may have sharded."""
    return getattr(matrix, "ds_shape", matrix.shape)[1]


def _num_elements(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, which ZeRO-3 may have sharded, or which may be stored in 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
