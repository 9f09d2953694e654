"""A folder that is complete only with its base: the adapter for peft, other trained weights, and `base.json`.

`save` writes a folder, and `add_trained_weights` adds its weights to the base, merged or not.
"""

import copy
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from vlm.assembly.adapter_base import WHOLE_CHECKPOINT, Base, without_quantization
from vlm.assembly.adapter_checks import check_adapter_settings, check_adapter_tensors, check_trained_tensors
from vlm.assembly.foreign_config import check_adapter_values, load_config
from vlm.assembly.opening import opening
from vlm.checks.checkpoint_files import ADAPTER_WEIGHTS, read_header, read_object
from vlm.config.derived import BASE_FILE
from vlm.families.parts import get_part_names
from vlm.models.vocabulary import find_vocabulary_head

if TYPE_CHECKING:
    from peft import LoraConfig

NON_LORA_WEIGHTS = "non_lora_trainables.safetensors"
"""New weights other than the adapter: those of trained parts, and those that no base has. The name is LLaVA's."""

HAS_ADAPTER = "has_adapter"
"""In the metadata of that file: whether the folder has an adapter. Folders of earlier versions do not say."""

PEFT_PREFIX = "base_model.model."
"""The prefix of names in peft's files."""


# Writing


def save(
    model: PreTrainedModel,
    folder: Path,
    base: Base,
    *,
    new_rows: Mapping[str, int] | None = None,
    is_writer: bool = True,
) -> None:
    """Write the weights that a model has in addition to its base. Every rank calls this, for ZeRO-3; one rank writes.

    `new_rows` maps the full name of each embedding of which only some rows trained to the first of those rows.
    """
    adapted = [name for name, _ in model.named_parameters() if ".lora_" in name]
    state = gather_tensors(model, {*adapted, *_non_adapter_names(model, base)}, keep=is_writer)
    if not is_writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if adapted:
        _save_adapter(model, {name: state.pop(name) for name in adapted}, folder, base)
    rows = _base_vocabulary_rows(model, base) | {_base_name(name): first for name, first in (new_rows or {}).items()}
    state = {_base_name(name): tensor[rows.get(_base_name(name), 0) :].contiguous() for name, tensor in state.items()}
    save_file(state, folder / NON_LORA_WEIGHTS, {"format": "pt", HAS_ADAPTER: str(bool(adapted))})
    base.write(folder)
    if save_custom_code := getattr(model, "save_custom_code", None):  # models of this framework alone
        save_custom_code(folder)
    _unquantised_config(model.config).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _non_adapter_names(model: PreTrainedModel, base: Base) -> set[str]:
    """Return the names of new tensors other than the adapter: trained ones, and those with random initial values."""
    part_of = get_part_names(model.config).part_of
    unsaved = model._keys_to_ignore_on_save or ()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in unsaved}
    parts = {part_of(name) for name in trained}
    if base.model is not None:
        parts.add("connector")
        grown = _base_vocabulary_rows(model, base)
        named = [name for name, _ in model.named_parameters() if name not in unsaved]
        trained |= {name for name in named if part_of(name) == "connector" or _base_name(name) in grown}
    saved = model.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers() if name in saved and part_of(name) in parts}
    return {name for name in trained if ".lora_" not in name} | buffers


def _base_vocabulary_rows(model: PreTrainedModel, base: Base) -> dict[str, int]:
    """Return name -> number of rows in the base, for embeddings that grew with the tokenizer; later rows are new.

    Embeddings that train are left out: all of their rows are new.
    """
    if base.model is None:
        return {}
    source = base.sources["language_model"]
    config = load_config(source.name, source.name, revision=source.revision)
    rows = config.get_text_config().vocab_size
    layers = [model.get_input_embeddings(), find_vocabulary_head(model)]
    named = {id(parameter): _base_name(name) for name, parameter in model.named_parameters()}
    weights = [layer.weight for layer in layers if layer is not None and not layer.weight.requires_grad]
    return {named[id(weight)]: rows for weight in weights if getattr(weight, "ds_shape", weight.shape)[0] > rows}


def gather_tensors(model: nn.Module, names: Collection[str], *, keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU, gathered one after the other if ZeRO-3 or FSDP2 shards them."""
    gathered = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in names:
            if hasattr(tensor, "ds_id"):
                import deepspeed  # slow to import, and only runs under it need it

                whole = deepspeed.zero.GatheredParameters([tensor])
            else:
                whole = nullcontext()
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()
            with whole:
                if keep:
                    gathered[name] = tensor.detach().cpu().clone().contiguous()
    return gathered


def _save_adapter(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, base: Base) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, with the full names of the adapted layers."""
    from peft import get_peft_model_state_dict  # slow to import, and only models with an adapter need it
    from peft.tuners.lora import LoraLayer

    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    prefixed = {PEFT_PREFIX + name: tensor for name, tensor in weights.items()}
    save_file(prefixed, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = cast("LoraConfig", copy.copy(model.peft_config["default"]))
    config.target_modules = sorted(name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    whole = base.sources.get(WHOLE_CHECKPOINT)
    config.base_model_name_or_path = None if whole is None else whole.name
    config.revision = None if whole is None else whole.revision
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _base_name(name: str) -> str:
    """Return a parameter's name in the model without an adapter."""
    return name.replace(".base_layer.", ".")


def _unquantised_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a model's configuration without quantisation at any depth."""
    plain = copy.deepcopy(config)
    waiting = [plain]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        if hasattr(config, "recipe"):
            config.recipe = without_quantization(config.recipe)
        nested = [getattr(config, name) for name in config.sub_configs]
        waiting += [config for config in nested if isinstance(config, PreTrainedConfig)]
    return plain


# Loading


def is_adapter_checkpoint(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint, a folder or a name on the Hub, is complete only together with its base."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint, BASE_FILE).is_file()
    base_file = cached_file(
        str(checkpoint),
        BASE_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return base_file is not None


def local_folder(checkpoint: str | Path) -> Path:
    """Return the folder that holds a checkpoint's files; a name on the Hub is downloaded."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(snapshot_download(str(checkpoint)))


def add_trained_weights(
    model: PreTrainedModel, folder: Path, *, merge: bool, needed: Collection[str] = ()
) -> PreTrainedModel:
    """Return a base with the weights that `save` wrote; the base already has the folder's heads and embedding rows.

    `needed` are names of weights that the base does not have and the folder must have.

    Raises:
        ValueError: the folder has weights of another model, or lacks some.
    """
    with opening(folder, "its adapter"):
        _overwrite_tensors(model, load_file(folder / NON_LORA_WEIGHTS), folder, needed)
        return _load_adapter(model, folder, merge=merge) if _has_adapter(folder) else model


def _has_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter, or should have one: an incomplete download must not pass for the base."""
    with safe_open(folder / NON_LORA_WEIGHTS, "np") as file:
        is_recorded = (file.metadata() or {}).get(HAS_ADAPTER) == "True"
    return is_recorded or any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_config.json"))


@torch.no_grad()
def _overwrite_tensors(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, needed: Collection[str]) -> None:
    """Overwrite tensors of a model; a tensor with fewer rows has the last rows (of embeddings that grew)."""
    current = dict([*model.named_parameters(), *model.named_buffers()])
    embeddings = {id(layer.weight) for layer in (model.get_input_embeddings(), find_vocabulary_head(model)) if layer}
    growing = {name for name, tensor in current.items() if id(tensor) in embeddings}
    check_trained_tensors(folder, state, current, needed=needed, growing=growing)
    for name, tensor in state.items():
        target = current[name] if current[name].ndim == 0 else current[name][-len(tensor) :]
        target.copy_(tensor)


def _load_adapter(model: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    """Return the model with the folder's adapter, merged into its weights or separate."""
    from peft import LoraConfig, set_peft_model_state_dict  # slow to import, and only models with an adapter need it
    from peft.tuners.lora import LoraModel

    file, layers = folder / "adapter_config.json", dict(model.named_modules())
    check_adapter_settings(file, read_object(file), read_header(folder / ADAPTER_WEIGHTS), layers)
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    check_adapter_tensors(folder, state)
    check_adapter_values(read_object(folder / "adapter_config.json"), LoraConfig().to_dict(), str(folder))
    config: object = LoraConfig.from_pretrained(str(folder))
    tuner = LoraModel(model, config, "default", state_dict=state)
    result = set_peft_model_state_dict(model, state, adapter_name="default")
    if problems := [*(name for name in result.missing_keys if ".lora_" in name), *result.unexpected_keys]:
        raise ValueError(f"{folder}: its adapter does not fit its base, for example {problems[0]}")
    return cast("PreTrainedModel", tuner.merge_and_unload(safe_merge=True)) if merge else model
