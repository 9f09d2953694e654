"""Opening a family's model: which auto class has it, and its weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from vlm.families.table import FAMILIES


def get_auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that a family's model loads through; Phi-4-multimodal is a causal language model to it."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if known else AutoModelForCausalLM


def load_family_config(
    name: str, key: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a Hub name or folder.

    Raises:
        ValueError: nothing loads from there, or it is of no family in the table; `key` is what named it, if one did.
    """
    named = f"{key}={name}" if key else name
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{named}: no model configuration there (a Hub name or a local folder with a config.json is needed): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{named}: model_type={config.model_type} is no family of vision-language models that is known here; "
            f"known are {', '.join(FAMILIES)}"
        )
    return config


def load_family_model(
    name: str, config: PreTrainedConfig, *, dtype: torch.dtype | str, attention: str, revision: str | None = None,
    trust_remote_code: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """The model with its weights.

    Args:
        name: Hub name or folder.
        config: its configuration.
        dtype: precision of its weights, or `auto` for that of the checkpoint.
        attention: attention implementation.
        revision: branch, tag or commit.
        trust_remote_code: whether code out of the repository may run.
        kwargs: further ones of `from_pretrained`, such as `quantization_config`.

    Raises:
        ValueError: the checkpoint holds less than the model needs.
    """
    model, info = get_auto_class(config).from_pretrained(
        name, config=config, dtype=dtype, attn_implementation=attention, revision=revision,
        trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs,
    )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} of the weights that {type(model).__name__} needs: {missing[:5]}")
    return model
