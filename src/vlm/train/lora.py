"""One adapter for all parts: which layers it adapts, and with what rank.

transformers' `add_adapter` puts it into the model, not around it, so the model's class and the names of its parameters
stay.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from vlm.assembly.model_interface import TrainableModel
from vlm.config.schema import PARTS, LoraConfig, LoraPartConfig
from vlm.families.parts import get_part_names
from vlm.models.vocabulary import find_vocabulary_head

if TYPE_CHECKING:
    import peft

PEFT_INITS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""`trainer.lora.init` -> peft's name. Other choices of peft change the base, which is not saved."""


def add_adapter(
    model: PreTrainedModel, lora: LoraConfig, seed: int, dtype: torch.dtype, unused_forms: Sequence[str] = ()
) -> None:
    """Put a new adapter of this precision into a loaded model, if any part is to have one.

    Its first weights depend on the seed alone; `unused_forms` as of `linear_layers`.

    Raises:
        ValueError: a part has no layer to adapt, or none of a name that was given.
    """
    targets = {
        part: layers
        for part in PARTS
        if (layers := select_adapted_layers(model, part, getattr(lora, part), unused_forms))
    }
    if not targets:
        return
    from peft.tuners.lora import LoraLayer  # slow to import, and only runs with an adapter need it

    torch.manual_seed(seed)
    model.add_adapter(peft_config(lora, targets))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {name for layers in targets.values() for name in layers}, "peft adapted other layers"
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def select_adapted_layers(
    model: TrainableModel, part: str, config: LoraPartConfig, unused_forms: Sequence[str] = ()
) -> list[str]:
    """Return full names of the layers of a part that get an adapter; `unused_forms` as of `linear_layers`.

    Raises:
        ValueError: the part has no Linear layer, or none whose name ends as `target_modules` says.
    """
    if config.r is None:
        return []
    linear = linear_layers(model, part, unused_forms)
    if not linear:
        raise ValueError(f"trainer.lora.{part}.r={config.r}: the {part} has no Linear layer to adapt; leave it null")
    if config.target_modules is None:
        return linear
    for ending in config.target_modules:
        if not any(f".{name}".endswith(f".{ending}") for name in linear):
            endings = sorted({name.rpartition(".")[2] for name in linear})
            close_matches = difflib.get_close_matches(ending, endings, 1)
            hint = f" Did you mean {close_matches[0]}?" if close_matches else ""
            raise ValueError(
                f"trainer.lora.{part}.target_modules: no Linear layer of the {part} that can be adapted is named "
                f"{ending}.{hint} Their names end in {', '.join(endings)}"
            )
    return [name for name in linear if f".{name}".endswith(tuple(f".{ending}" for ending in config.target_modules))]


def linear_layers(model: TrainableModel, part: str, unused_forms: Sequence[str] = ()) -> list[str]:
    """Return full names of a part's Linear layers, without `lm_head`, layers that no answer depends on, and others.

    Those that no answer depends on are of the family, and by what their forms begin with, `unused_forms`, of its trial.
    The others would run without their adapter, see `computes_as_linear` and `is_called`.
    """
    names, head = get_part_names(model.config, unused_forms), find_vocabulary_head(model)
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and module is not head
        and computes_as_linear(module)
        and names.part_of(f"{name}.weight") == part
        and not names.is_unused(f"{name}.weight")
        and is_called(modules, name)
    ]


def computes_as_linear(layer: nn.Linear) -> bool:
    """Return whether a layer computes what a Linear layer does, so that peft can add to it.

    Classes of models may compute more: the routers of Llama 4 return two tensors. Those of bitsandbytes are peft's own.
    """
    kind = type(layer)
    return kind.__module__.startswith("bitsandbytes.") or _forward_is_linear(kind)


@cache
def _forward_is_linear(kind: type[nn.Linear]) -> bool:
    """Return whether `forward` of a class of layers is that of Linear, or does the same with small weights."""
    if kind.forward is nn.Linear.forward:
        return True
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight, layer.bias = nn.Parameter(torch.eye(2, 3)), nn.Parameter(torch.ones(2))
    inputs = torch.arange(3.0)[None]
    try:
        output = kind.forward(layer, inputs)
    except Exception:  # whatever a class of a model needs besides
        return False
    return isinstance(output, torch.Tensor) and torch.equal(output, nn.Linear.forward(layer, inputs))


def is_called(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether a layer is called wherever it is used: an adapter does nothing where code takes its weight.

    So do attention of torch (`NonDynamicallyQuantizableLinear`) and, perhaps only on a GPU, the fused operations of
    state-space models: peft names these for some types of models by itself, and a composed model has none of them.
    """
    parent, _, attribute = name.rpartition(".")
    if isinstance(modules[name], NonDynamicallyQuantizableLinear):
        return False
    return not takes_weight(type(modules[parent]), attribute)


@cache
def takes_weight(kind: type[nn.Module], attribute: str) -> bool:
    """Return whether a method of a class takes the weight of one of its layers, other than to look at its form.

    Slices do not count: Bloom's code has some for a setting (`slow_but_exact`) that is off.
    """
    pattern = re.compile(rf"(?<!isinstance\()self\.{re.escape(attribute)}\.weight\b(?!\.(dtype|device|shape)\b|\[)")
    methods = (method for method in _methods(kind) if {attribute, "weight"} <= {*method.__code__.co_names})
    return any(pattern.search(inspect.getsource(method)) for method in methods)  # models come with their source


def _methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield the functions of a class and of its bases that are no classes of torch, without what is put around them."""
    for base in kind.__mro__:
        if not base.__module__.startswith("torch."):
            yield from (inspect.unwrap(value) for value in vars(base).values() if isinstance(value, FunctionType))


def peft_config(lora: LoraConfig, targets: dict[str, list[str]]) -> "peft.LoraConfig":
    """Return peft's configuration: layers by their full names, ranks that differ by part as patterns of the names."""
    import peft  # slow to import, and only runs with an adapter need it

    ranks, alphas = {}, {}
    for part, layers in targets.items():
        config: LoraPartConfig = getattr(lora, part)
        assert config.r is not None
        ranks |= dict.fromkeys(layers, config.r)
        alphas |= dict.fromkeys(layers, config.alpha or 2 * config.r)
    typical = max(targets.values(), key=len)[0]
    return peft.LoraConfig(
        r=ranks[typical],
        lora_alpha=alphas[typical],
        target_modules=list(ranks),  # peft reads `^name` as this layer and no other
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != ranks[typical]},
        alpha_pattern={f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != alphas[typical]},
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias=lora.bias,  # pyright: ignore[reportArgumentType] - checked against the same list
        init_lora_weights=PEFT_INITS[lora.init],
    )


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter, by its full name."""
    return any(step.startswith("lora_") for step in name.split("."))


def is_trained_with_adapter(name: str, lora: LoraConfig) -> bool:
    """Return whether a parameter of a part with an adapter trains: the adapter's, and the biases that `bias` names."""
    if is_adapter(name) or lora.bias == "none":
        return is_adapter(name)
    return name.endswith(".base_layer.bias") or (lora.bias == "all" and name.endswith(".bias"))
