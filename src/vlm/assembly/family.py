"""Opens a model of a family: its configuration, its auto class and its weights."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from vlm.assembly.foreign_config import ForeignCodeError, load_config
from vlm.assembly.hub_reach import check_hub_answers
from vlm.assembly.loading import inspect_checkpoint, load_complete
from vlm.assembly.opening import opening, shorten
from vlm.families.meta_model import NotAFamilyError, get_auto_class
from vlm.families.parts import get_part_names
from vlm.families.row_by_row import keep_apart


def read_config(
    name: str, label: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the configuration of a Hub name or folder; messages call it `label`, such as `model.hf_name=NAME`."""
    check_hub_answers(name, label, revision)
    with opening(label):
        has_config = inspect_checkpoint(name, revision) is not None
    with opening(label, "its config.json"):
        try:
            return load_config(name, label, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            if has_config or isinstance(error, ForeignCodeError):
                raise
            raise ValueError(
                f"{label}: no model configuration there (a Hub name or a local folder with a config.json is needed): "
                f"{shorten(str(error))}"
            ) from error


def check_is_family(config: PreTrainedConfig, label: str) -> None:
    """Raise ValueError unless a configuration is that of a vision-language model whose parts can be detected.

    For this, its model is built on the meta device, once for each configuration.
    """
    try:
        get_part_names(config)
    except NotAFamilyError as error:
        raise ValueError(f"{label}: {error}") from error


def load_family_config(
    name: str, key: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the configuration of a family's model; `key` is the option that named it."""
    label = f"{key}={name}" if key else name
    config = read_config(name, label, revision, trust_remote_code=trust_remote_code)
    check_is_family(config, label)
    return config


def load_family_model(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Return a family's model with its weights.

    Args:
        name: Hub name or folder.
        config: the model's configuration.
        dtype: precision of the weights, or `auto` for that of the checkpoint.
        attention: attention implementation; None: transformers chooses.
        revision: branch, tag or commit.
        trust_remote_code: whether code from the repository may run.
        quantization_config: which matrices are stored in fewer bits; None: none.

    Raises:
        ValueError: as `load_complete`.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    model = load_complete(
        get_auto_class(config),
        name,
        config=config,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantization_config=quantization_config,
        **options,
    )
    keep_apart(model)
    return model
