"""Proves before training that a model loads what it saves: names, shapes and computed buffers.

The model is saved to memory and loaded from there, with stand-ins for its tensors that take no memory. Each stand-in is
filled with one number, by which it is recognised after loading. If transformers joins and splits tensors (experts),
this would take as much memory as the model; then stand-ins have only shapes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from vlm.assembly.loading import LoadingInfo
from vlm.assembly.opening import quiet_loading
from vlm.assembly.saving import use_canonical_names
from vlm.families.meta_model import without_zero3

NUM_MARKS = 251
"""The number of different values of stand-ins, each of which bfloat16 represents exactly."""

ROUNDING = 0.02
"""The largest relative difference of buffers that counts as rounding."""

MARKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def saved_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `save_complete` writes for this state: name on disk -> tensor, tied ones once.

    Raises:
        RuntimeError: parameters are one tensor without being declared as tied.
    """
    use_canonical_names(model)
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))


def check_round_trip(model: PreTrainedModel) -> None:
    """Refuse a model that would not be loaded as it was saved; quantised models, which are saved on a base, pass.

    Raises:
        ValueError: the model cannot be saved, or loading it misses a weight, mixes up weights, initialises one again,
            or computes an unsaved buffer differently.
    """
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        return
    kind = type(model).__name__
    joins_tensors = any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model))
    options: dict[str, Any] = {"device_map": "meta"} if joins_tensors else {}
    stand_ins = make_stand_ins(model, "meta" if joins_tensors else "cpu")
    try:
        saved = saved_tensors(model, stand_ins)
    except RuntimeError as error:
        raise ValueError(
            f"{kind} cannot be saved: {str(error).splitlines()[0]} Declare tied tensors in _tied_weights_keys, or copy "
            "them"
        ) from error
    try:
        with quiet_loading(), without_zero3(), torch.random.fork_rng(devices=[]):  # leaves the run's random state
            result: Any = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=saved,
                dtype=model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except RuntimeError as error:
        raise ValueError(f"{kind} does not load what it saves: {str(error).splitlines()[0]}") from error
    loaded, info = result
    problems = [*_loading_problems(info), *_changed_tensors(model, stand_ins, loaded)]
    if problems:
        raise ValueError(
            f"{kind} does not load what it saves, so the trained model would be lost: {'; '.join(problems[:3])}. A "
            "connector or head of your own must register its state as parameters or persistent buffers, and "
            "must not initialise it again when it is loaded"
        )


def make_stand_ins(model: PreTrainedModel, device: str = "cpu") -> dict[str, Tensor]:
    """Return a state of a model with a stand-in of each saved tensor, whole where ZeRO-3 shards it.

    Each holds the number `mark_of` its place among the tensors, those that are tied the same.
    """
    made: dict[int, Tensor] = {}
    stand_ins = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            mark = torch.full((), mark_of(len(made), tensor.dtype), dtype=tensor.dtype, device=device)
            made[id(tensor)] = mark.expand(getattr(tensor, "ds_shape", tensor.shape))
        stand_ins[name] = made[id(tensor)]
    return stand_ins


def mark_of(place: int, dtype: torch.dtype) -> int:
    """Return the number of a stand-in, which its precision holds exactly."""
    return place % NUM_MARKS + 1 if dtype in MARKED else 1


def _loading_problems(info: LoadingInfo) -> Iterator[str]:
    """Yield the problems that transformers reports on loading."""
    for found, problem in ((info["missing_keys"], "lacks"), (info["unexpected_keys"], "has no place for")):
        if names := sorted(found):
            yield f"it {problem} {_shorten(names)}"
    if mismatched := sorted(info["mismatched_keys"], key=str):
        name, saved, needed = mismatched[0]
        yield f"{name} was saved with the shape {tuple(saved)}, but {tuple(needed)} is needed"


def _changed_tensors(model: PreTrainedModel, stand_ins: Mapping[str, Tensor], loaded: PreTrainedModel) -> Iterator[str]:
    """Yield which tensors after loading are not those that were saved, and which buffers were computed differently."""
    state = loaded.state_dict()
    places: dict[int, int] = {}
    for name, stand_in in stand_ins.items():
        mark = mark_of(places.setdefault(id(stand_in), len(places)), stand_in.dtype)
        tensor = state.get(name)
        if tensor is None or tensor.shape != stand_in.shape or not _has_mark(tensor, mark):
            yield f"{name} has other values after loading"
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in stand_ins and not is_equal(buffer, buffers.get(name)):
            yield f"the buffer {name}, which is not saved, has other values after loading"


def _has_mark(tensor: Tensor, mark: int) -> bool:
    """Return whether a loaded tensor begins and ends with a number: its stand-in's may have been overwritten too."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    ends = (tensor[(0,) * tensor.ndim], tensor[(-1,) * tensor.ndim])
    return all(float(end) == mark for end in ends)


def is_equal(buffer: Tensor, loaded: Tensor | None) -> bool:
    """Return whether a buffer was computed with the same result; on the meta device, whether shapes are the same.

    Under ZeRO-3 buffers may be computed in half precision and on another device, so numbers may differ by rounding.
    """
    if loaded is None or buffer.shape != loaded.shape:
        return False
    if loaded.is_meta or not buffer.is_floating_point():
        return loaded.is_meta or torch.equal(buffer.cpu(), loaded)
    expected = buffer.cpu().float()
    scale = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(expected, loaded.float(), rtol=ROUNDING, atol=ROUNDING * scale, equal_nan=True)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
