"""Quantised parts: matrices in 4 or 8 bits, by bitsandbytes through transformers.

They stay frozen; adapters train on them (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). Norms, embeddings and
`lm_head` keep the precision of the run.
"""

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from vlm.assembly.family import get_auto_class
from vlm.config.model_schema import ModelConfig
from vlm.families.parts import get_part_names
from vlm.models.vocabulary import find_vocabulary_head


def make_quantization_config(kind: str, skipped: Collection[str] | None = None) -> BitsAndBytesConfig:
    """Return the configuration of `8bit` or `4bit` (NF4, its constants quantised too).

    `skipped` are full names of the layers that stay unquantised; None: `lm_head`, as transformers finds it.
    """
    check_bitsandbytes(kind)
    skip = None if skipped is None else sorted(skipped)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
    )


def check_bitsandbytes(kind: str) -> None:
    """Raise ValueError if bitsandbytes cannot quantise here."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization {kind}: bitsandbytes is not installed: pip install 'small-vlm[quant]'")
    from bitsandbytes import supported_torch_devices  # slow to import, and only some runs need it

    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else accelerator.type
    if device not in supported_torch_devices:
        allowed = ", ".join(sorted(supported_torch_devices))
        raise ValueError(f"quantization {kind}: bitsandbytes cannot use this machine's {device}; it can use {allowed}")


def make_checkpoint_quantization(config: PreTrainedConfig, kinds: Mapping[str, str]) -> BitsAndBytesConfig | None:
    """Return the configuration that quantises the named parts' Linear layers of a checkpoint; None for no parts.

    `kinds` is part -> `8bit` or `4bit`, the same for all.
    """
    if not kinds:
        return None
    with torch.device("meta"):
        model = get_auto_class(config).from_config(config)
    part_of = get_part_names(config).part_of
    head = find_vocabulary_head(model)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = [name for name, module in linear if module is head or part_of(f"{name}.weight") not in kinds]
    return make_quantization_config(next(iter(kinds.values())), skipped)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make 4-bit layers multiply in a given precision, whatever the precision of their first input is."""
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):  # bitsandbytes' Linear4bit
            layer: Any = module
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


def quantized_parts(model: ModelConfig) -> dict[str, str]:
    """Return part -> kind of quantization, for the parts that are quantised."""
    kinds = {"visual_encoder": model.visual_encoder.quantization, "language_model": model.language_model.quantization}
    return {part: kind for part, kind in kinds.items() if kind is not None}
