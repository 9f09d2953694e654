"""How every model gets its weights: `load_complete`, which refuses weights that are missing, unexpected or misshapen.

Names and shapes are compared first on the meta device, with what the headers of the files say, so that a configuration
that claims more than its weights hold costs neither memory nor time.
"""

import copy
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import cached_file

from vlm.assembly.opening import opening, quiet_loading, shorten
from vlm.checks.checkpoint_files import (
    INDEX,
    PACKED,
    SAFETENSORS,
    TensorHeader,
    inspect_folder,
    read_headers,
    read_object,
    shown,
)
from vlm.checks.checkpoint_numbers import PROCESSOR_FILES, check_numbers, check_processor_numbers
from vlm.config.derived import BASE_FILE
from vlm.families.meta_model import without_zero3

RECOMPUTED = re.compile(r"(^|\.)(inv_freq|original_inv_freq|position_ids|num_batches_tracked|masked_bias)$")
"""Buffers that earlier versions of transformers saved, and that a model computes for itself."""
NUM_CHECKED = 4096
"""Numbers of a weight, evenly spread, that are looked at for NaN and infinity."""
MASK_DIMENSIONS = 4
"""Dimensions of the causal masks that earlier versions of transformers saved."""
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

ModelClass = type[_BaseAutoModelClass] | type[PreTrainedModel]


class LoadingInfo(TypedDict):
    """What transformers says of loading: names of weights, and of those of another shape both shapes."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]
    error_msgs: list[str]


def inspect_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """Look at a checkpoint's files before any library opens them, and return their folder.

    Of a name on the Hub, the configuration is fetched and looked at; weights are looked at when they are loaded. None:
    there is no configuration.

    Raises:
        ValueError: a file is none that a checkpoint can have, see `vlm.checks.checkpoint_files`.
    """
    if (folder := Path(name)).is_dir():
        if not os.path.lexists(folder / "config.json"):
            return None
        inspect_folder(folder)
        is_adapter = (folder / BASE_FILE).is_file()
        headers = None if is_adapter else read_headers(folder)
        check_numbers(folder / "config.json", read_object(folder / "config.json"), headers)
        for file in (folder / name for name in PROCESSOR_FILES):
            if file.is_file():
                check_processor_numbers(file, read_object(file))
        return folder
    try:
        found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # transformers says why, when it is asked for the configuration
        return None
    if found is None:
        return None
    check_numbers(Path(found), read_object(Path(found)), None)
    return Path(found).parent


def read_weight_headers(name: str, revision: str | None = None) -> dict[str, TensorHeader] | None:
    """Return the headers of a model's weights, which are fetched from the Hub; None if they are no safetensors."""
    if Path(name).is_dir():
        return read_headers(Path(name))
    options: dict[str, object] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (whole := cached_file(name, SAFETENSORS, **options)) is not None:
        return read_headers(Path(whole).parent)
    if (index := cached_file(name, INDEX, **options)) is None:
        return None
    for file in sorted(set(map(str, read_object(Path(index)).get("weight_map", {}).values()))):
        cached_file(name, file, **options)
    return read_headers(Path(index).parent)


def load_complete(
    kind: ModelClass,
    name: str,
    *,
    config: PreTrainedConfig,
    new: Collection[str] = (),
    unused: Collection[str] = (),
    is_part: bool = False,
    num_layers: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return a model with its weights, all of which the checkpoint has.

    Args:
        kind: the class that loads it.
        name: a folder, or a name on the Hub.
        config: the model's configuration.
        new: names of weights that the checkpoint need not have, because the run adds them.
        unused: names of weights that the checkpoint may have, and the run leaves out.
        is_part: whether the checkpoint may hold more than is loaded, as one with a text tower of which the visual
            encoder alone is read. Further layers of what is loaded are refused all the same.
        num_layers: the number of layers of the part in its checkpoint, where fewer are loaded on purpose.
        options: passed on to transformers' `from_pretrained`.

    Raises:
        ValueError: weights are missing, unexpected, misshapen, of another type or not finite; names them.
    """
    with opening(name, "its weights"):
        if is_part and (prefix := _find_part(kind, config, name, options.get("revision"))) is not None:
            options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        mapping = options.get("key_mapping")
        rules = _Rules(name, frozenset(new), frozenset(unused), is_part, num_layers, mapping)
        _check_headers(kind, config, rules, options)
        loaded: Any = kind.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, info = loaded
        rules.check(type(model).__name__, info, model)
        check_finite(name, model)
    return model


def _find_part(kind: ModelClass, config: PreTrainedConfig, name: str, revision: str | None) -> str | None:
    """Return what is before the names of a part's weights in the checkpoint of a whole model, such as `visual.`.

    None if the part is loaded by its own names, or by the prefix that its class has for whole models.
    """
    model_class = _model_class(kind, config)
    headers = read_weight_headers(name, revision)
    if model_class is None or headers is None:
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        names = {tensor for tensor, _ in model_class(copy.deepcopy(config)).named_parameters()}
    first = min(names)
    own = {"", f"{model_class.base_model_prefix}."}
    prefixes = {tensor.removesuffix(first) for tensor in headers if tensor.endswith(first)}
    if prefixes & own:
        return None
    whole = [prefix for prefix in sorted(prefixes) if names <= {tensor.removeprefix(prefix) for tensor in headers}]
    return whole[0] if len(whole) == 1 else None


def _model_class(kind: ModelClass, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers that a configuration is of; None: a checkpoint's own, or one of several."""
    if not issubclass(kind, _BaseAutoModelClass):
        return kind
    assert kind._model_mapping is not None
    model_class = kind._model_mapping.get(type(config), None)
    return model_class if isinstance(model_class, type) else None


def check_weights(kind: ModelClass, name: str, config: PreTrainedConfig, revision: str | None = None) -> None:
    """Raise ValueError if a checkpoint does not hold a model's weights, by the headers of its files alone."""
    with opening(name, "its weights"):
        _check_headers(kind, config, _Rules(name), {"revision": revision})


def _check_headers(kind: ModelClass, config: PreTrainedConfig, rules: "_Rules", options: Mapping[str, Any]) -> None:
    """Compare a model with the headers of its weights; quantised ones, and those that are no safetensors, are not."""
    headers = read_weight_headers(rules.name, options.get("revision"))
    if headers is not None and not _is_quantized(config, options):
        _check_types(rules.name, headers)
        _compare_on_meta(kind, config, headers, rules)


def _is_quantized(config: PreTrainedConfig, options: Mapping[str, object]) -> bool:
    """Return whether weights are stored, or become, other than they are trained."""
    return options.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None


def _check_types(name: str, headers: Mapping[str, TensorHeader]) -> None:
    """Raise ValueError if a weight is no floating-point number; masks that GPT-2 and its kin name `bias` may be."""
    for tensor, header in headers.items():
        is_weight = tensor.endswith(".weight") or (tensor.endswith(".bias") and len(header.shape) < MASK_DIMENSIONS)
        if is_weight and not header.is_floating:
            packed = " (it is quantised, and config.json has no quantization_config)" if header.dtype in PACKED else ""
            raise ValueError(
                f"{name}: {shown(tensor)} is of type {header.dtype}{packed}; allowed are {', '.join(TORCH_DTYPES)}"
            )


def _compare_on_meta(
    kind: ModelClass, config: PreTrainedConfig, headers: Mapping[str, TensorHeader], rules: "_Rules"
) -> None:
    """Load a model without memory from what the headers say, and refuse what does not fit."""
    model_class: Any = _model_class(kind, config)  # declared without its keyword arguments
    if model_class is None:
        return
    config = copy.deepcopy(config)
    state = {
        tensor: torch.empty(header.shape, dtype=TORCH_DTYPES.get(header.dtype, torch.int64), device="meta")
        for tensor, header in headers.items()
    }
    with quiet_loading(), without_zero3(), torch.random.fork_rng(devices=[]):
        loaded = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map="meta",
            key_mapping=rules.key_mapping,
        )
    model, info = loaded
    rules.check(model_class.__name__, info, model)


@dataclass(frozen=True)
class _Rules:
    """Which differences between a model and its checkpoint are allowed; see `load_complete`."""

    name: str
    new: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    is_part: bool = False
    num_layers: int | None = None
    key_mapping: Mapping[str, str] | None = None

    def check(self, kind: str, info: LoadingInfo, model: nn.Module) -> None:
        """Raise ValueError if the checkpoint is not that of the model, by what transformers says of loading it."""
        if misshapen := sorted(info["mismatched_keys"], key=str):
            tensor, saved, needed = misshapen[0]
            raise ValueError(
                f"{self.name}: {shown(tensor)} has the shape {tuple(saved)}, but {kind} needs {tuple(needed)} by "
                f"config.json{_more(misshapen)}"
            )
        if missing := sorted(info["missing_keys"] - self.new):
            names = [shown(name) for name in missing[:5]]
            raise ValueError(f"{self.name} lacks {len(missing)} of the weights that {kind} needs: {names}")
        if unexpected := sorted(filter(self._is_unexpected(model), info["unexpected_keys"] - self.unused)):
            raise ValueError(
                f"{self.name} has {shown(unexpected[0])}, which {kind} does not have by config.json"
                f"{_more(unexpected)}: the weights and config.json belong to different models"
            )
        if errors := info.get("error_msgs"):
            raise ValueError(f"{self.name}: {shorten(str(next(iter(errors))))}")

    def _is_unexpected(self, model: nn.Module) -> Callable[[str], bool]:
        """Return the function that says whether a name is one that the checkpoint must not hold."""
        if not self.is_part:
            return lambda name: RECOMPUTED.search(name) is None
        stacks = {_without_numbers(name) for name in model.state_dict()}

        def is_further_layer(name: str) -> bool:
            """Return whether a name belongs to a layer beyond those that the configuration has."""
            numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
            if RECOMPUTED.search(name) or not numbers or _without_numbers(name) not in stacks:
                return False
            return self.num_layers is None or max(numbers) >= self.num_layers

        return is_further_layer


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def _more(names: Collection[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@torch.no_grad()
def check_finite(name: str | Path, model: nn.Module) -> None:
    """Raise ValueError if a weight is NaN or infinite, by some of its numbers, evenly spread.

    Weights that a run shards, or that lie nowhere yet, are not looked at.
    """
    for tensor_name, tensor in model.named_parameters():
        if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if hasattr(tensor, "ds_id") or tensor.element_size() == 1:
            continue
        flat = tensor.reshape(-1)
        if not torch.isfinite(flat[:: max(1, len(flat) // NUM_CHECKED)]).all():
            raise ValueError(f"{name}: {shown(tensor_name)} is NaN or infinite; the weights are damaged")
