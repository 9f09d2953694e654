"""A model of a family without weights: built on the meta device from its configuration alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import logging as transformers_logging

AutoClass = type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]

REMOTE_MODULE = "transformers_modules."
"""What the modules of classes begin with that came out of a checkpoint's repository."""
MAX_MESSAGE = 200
"""Characters of a library's message that a refusal repeats."""


class NotAFamilyError(ValueError):
    """A model cannot be trained as a family; the message says why, and begins with `model_type=…`."""


def get_auto_class(config: PreTrainedConfig) -> AutoClass:
    """Return the auto class that a model loads through; Phi-4-multimodal counts as a causal language model.

    Of a configuration class that came out of a repository, `auto_map` says which.
    """
    if is_remote(config):
        names = getattr(config, "auto_map", None) or {}
        return AutoModelForImageTextToText if "AutoModelForImageTextToText" in names else AutoModelForCausalLM
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if known else AutoModelForCausalLM


def is_remote(config: PreTrainedConfig) -> bool:
    """Return whether a configuration's class came out of a repository: its user has trusted the code there."""
    return type(config).__module__.startswith(REMOTE_MODULE)


def build_meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with this configuration on the meta device; it takes no memory, the configuration is not changed.

    Raises:
        NotAFamilyError: its auto class has no model of this type, or the model cannot be built.
    """
    auto, remote = get_auto_class(config), is_remote(config)
    if remote:
        if auto.__name__ not in (getattr(config, "auto_map", None) or {}):
            raise NotAFamilyError(
                f"model_type={config.model_type}: its config.json has no auto_map entry for "
                "AutoModelForImageTextToText or AutoModelForCausalLM, so its class is unknown"
            )
    elif type(config) not in auto._model_mapping:
        raise NotAFamilyError(
            f"model_type={config.model_type}: the installed transformers has no model of this type in "
            "AutoModelForImageTextToText"
        )
    config = deepcopy(config)
    for own in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if own is not None and hasattr(own, "quantization_config"):
            delattr(own, "quantization_config")
    options = {"trust_remote_code": True} if remote else {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"), without_zero3():
            return auto.from_config(config, attn_implementation="eager", **options)
    except Exception as error:  # a configuration may be wrong in any way, and code of a repository may do anything
        said = " ".join(str(error).split())[:MAX_MESSAGE]
        raise NotAFamilyError(
            f"model_type={config.model_type}: no model can be built with this configuration: "
            f"{type(error).__name__}: {said}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Build or load whole tensors, also where the run shards its own."""
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference
