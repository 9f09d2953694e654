"""One adapter over all parts that have one: which layers it adapts, and with what rank.

It is put into the model, not around it (`add_adapter` of transformers), so the model's class and the names of its
parameters stay.
"""

import difflib
import re

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from vlm.assembly.model_interface import TrainableModel
from vlm.config.schema import PARTS, LoraConfig, LoraPartConfig
from vlm.families.table import get_part_names

PEFT_INITS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""`trainer.lora.init` -> what peft calls it. Others of its choices change the base, which is not saved."""


def add_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int, dtype: torch.dtype) -> None:
    """Put a fresh adapter into a model, if any part is to have one.

    Its first weights depend on `seed` alone.

    Args:
        model: the model with its weights.
        lora: ranks and targets.
        seed: for the first weights.
        dtype: of the adapter.

    Raises:
        ValueError: a part has no layer to adapt, or none of a name that was given.
    """
    targets = {part: layers for part in PARTS if (layers := select_adapted_layers(model, part, getattr(lora, part)))}
    if not targets:
        return
    torch.manual_seed(seed)
    model.add_adapter(peft_config(lora, targets))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {name for layers in targets.values() for name in layers}, "peft adapted other layers"
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def select_adapted_layers(model: TrainableModel, part: str, own: LoraPartConfig) -> list[str]:
    """Full names of the layers of a part that get an adapter.

    Raises:
        ValueError: there is none, or none whose name ends as it should.
    """
    if own.r is None:
        return []
    linear = linear_layers(model, part)
    if not linear:
        raise ValueError(f"trainer.lora.{part}.r={own.r}: the {part} has no Linear layer to adapt")
    if own.target_modules is None:
        return linear
    for ending in own.target_modules:
        if not any(f".{name}".endswith(f".{ending}") for name in linear):
            endings = sorted({name.rpartition(".")[2] for name in linear})
            close_matches = difflib.get_close_matches(ending, endings, 1)
            hint = f" Did you mean {close_matches[0]}?" if close_matches else ""
            raise ValueError(
                f"trainer.lora.{part}.target_modules: no Linear layer of the {part} is named {ending}.{hint} Their "
                f"names end in {', '.join(endings)}"
            )
    return [name for name in linear if any(f".{name}".endswith(f".{ending}") for ending in own.target_modules)]


def linear_layers(model: TrainableModel, part: str) -> list[str]:
    """Full names of a part's Linear layers: without `lm_head`, and without those that no answer depends on."""
    names, head = get_part_names(model.config), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # attention reads its weight and never calls it
        and names.part_of(f"{name}.weight") == part
        and not names.is_unused(f"{name}.weight")
    ]


def peft_config(lora: LoraConfig, targets: dict[str, list[str]]) -> peft.LoraConfig:
    """Peft's configuration: the layers by their full names, and ranks that differ by part as patterns of those.

    Args:
        lora: the run's.
        targets: part -> full names of its layers.
    """
    ranks, alphas = {}, {}
    for part, layers in targets.items():
        own: LoraPartConfig = getattr(lora, part)
        assert own.r is not None
        for name in layers:
            ranks[name], alphas[name] = own.r, own.alpha or 2 * own.r
    rank, alpha = ranks[max(targets.values(), key=len)[0]], alphas[max(targets.values(), key=len)[0]]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={_exact_name_pattern(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={_exact_name_pattern(name): value for name, value in alphas.items() if value != alpha},
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias=lora.bias,  # pyright: ignore[reportArgumentType] - checked against the same list
        init_lora_weights=PEFT_INITS[lora.init],  # pyright: ignore[reportArgumentType] - a subset of peft's
    )


def _exact_name_pattern(name: str) -> str:
    """A pattern, as peft reads it, that one layer's name fits and no other."""
    return f"^{re.escape(name)}"


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its full name."""
    return any(step.startswith("lora_") for step in name.split("."))


def is_trained_with_adapter(name: str, lora: LoraConfig) -> bool:
    """Whether a parameter of a part with an adapter trains: the adapter's own, and the biases that `bias` names."""
    if is_adapter(name) or lora.bias == "none":
        return is_adapter(name)
    return name.endswith(".base_layer.bias") or (lora.bias == "all" and name.endswith(".bias"))
