"""Refuses configurations of checkpoints that ask for code which is neither saved with them nor part of a library.

The author of a checkpoint writes its `config.json`. transformers and the libraries below it read names from it that can
lead to code or files elsewhere: kernels of the Hub as attention, and arguments of timm. They are refused by name, even
with `trust_remote_code`, which only covers code that is saved with the checkpoint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

ATTENTION_KEYS = ("attn_implementation", "experts_implementation")
"""Keys whose values choose functions by name, also with the prefix `_` or the suffix `_internal`."""
PLAIN_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "grouped_mm",
    "batched_mm",
    "auto",
)
"""Names of implementations that are part of transformers; others are kernels of the Hub: `owner/name`."""
KERNEL_KEYS = ("use_kernels", "kernel_config")
TIMM_TYPES = ("timm_wrapper", "timm_backbone")
TIMM_NAMES = ("architecture", "backbone")
TIMM_ARGUMENTS = ("model_args", "backbone_kwargs")
FORBIDDEN_WORDS = ("pretrained", "path", "cfg", "cache", "file", "url", "jit", "script")
"""Words in names of timm's arguments that read files, addresses or settings."""


class ForeignCodeError(ValueError):
    """A checkpoint that asks for code or files elsewhere."""


def load_config(
    name: str | Path, label: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the configuration of a folder or a name on the Hub, which messages call `label`.

    Raises:
        ForeignCodeError: it asks for code or files elsewhere.
        ValueError: as transformers raises it.
        OSError: there is none.
    """
    values, _ = PreTrainedConfig.get_config_dict(str(name), revision=revision)
    check_config_values(values, label)
    config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
    drop_flash_attention(config)
    return config


def check_config_values(values: Mapping[str, object], label: str) -> None:
    """Refuse a configuration that asks for code or files elsewhere, at any depth.

    Args:
        values: the content of `config.json`.
        label: what messages call the checkpoint.

    Raises:
        ForeignCodeError: with the key and its value.
    """
    for key, value, reason in _problems(values, ""):
        raise ForeignCodeError(f"{label}: its config.json has {key}={str(value)[:80]}, {reason}; remove it there")


def _problems(node: object, path: str) -> Iterator[tuple[str, object, str]]:
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from _problems(child, f"{path}{number}.")
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        if str(name).lstrip("_").removesuffix("_internal") in ATTENTION_KEYS:
            implementations = value.values() if isinstance(value, Mapping) else [value]
            if any(item is not None and item not in PLAIN_IMPLEMENTATIONS for item in implementations):
                yield f"{path}{name}", value, "which would load a kernel, and so run code, from another place"
        elif str(name).lstrip("_") in KERNEL_KEYS and value:
            yield f"{path}{name}", value, "which would load kernels, and so run code, from another place"
        if node.get("model_type") in TIMM_TYPES or name == "timm_backbone":
            yield from _timm_problems(str(name), value, path)
        yield from _problems(value, f"{path}{name}.")


def _timm_problems(name: str, value: object, path: str) -> Iterator[tuple[str, object, str]]:
    """Yield values that would make timm read from another place than the checkpoint."""
    if name in TIMM_NAMES and isinstance(value, str) and (":" in value or "/" in value):
        yield f"{path}{name}", value, "which is not an architecture of timm but another place"
    if name in TIMM_ARGUMENTS and isinstance(value, Mapping):
        for argument, setting in value.items():
            if any(word in str(argument) for word in FORBIDDEN_WORDS) or isinstance(setting, Mapping):
                yield f"{path}{name}.{argument}", setting, "which would read another place than the checkpoint"


def drop_flash_attention(config: PreTrainedConfig) -> None:
    """Remove requests for flash attention from a configuration, at any depth: the caller chooses.

    If the library is not installed, transformers would load a kernel of the Hub instead.
    """
    waiting: list[PreTrainedConfig] = [config]
    while waiting:
        node = waiting.pop()
        if str(node._attn_implementation).startswith("flash"):
            node._attn_implementation = None
        waiting += [child for child in vars(node).values() if isinstance(child, PreTrainedConfig)]


def check_reference(reference: str, label: str) -> str:
    """Return a reference to a class (`file.Class`) whose file is saved with the checkpoint.

    Raises:
        ForeignCodeError: it names the code of another repository (`owner/name--file.Class`), or another folder.
    """
    if not reference.replace(".", "").replace("_", "").isalnum():
        raise ForeignCodeError(f"{label}: {reference[:80]} is not a class of a file that is saved with the checkpoint")
    return reference


PLAIN_ADAPTER_KEYS = (
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora",
    "init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_bias", "fan_in_fan_out",
)  # fmt: skip
"""Keys of `adapter_config.json` that name nothing to import or to open; all others must have PEFT's defaults."""


def check_adapter_values(values: Mapping[str, object], defaults: Mapping[str, object], label: str) -> None:
    """Refuse an adapter's configuration that sets other keys, since some of them name modules and files.

    Args:
        values: the content of `adapter_config.json`.
        defaults: the values of a default configuration.
        label: the name of the adapter for messages.

    Raises:
        ForeignCodeError: with the key.
    """
    for key, value in values.items():
        if key not in PLAIN_ADAPTER_KEYS and value and value != defaults.get(key):
            raise ForeignCodeError(
                f"{label}: its adapter_config.json has {key}={str(value)[:80]}, which is not allowed"
            )
