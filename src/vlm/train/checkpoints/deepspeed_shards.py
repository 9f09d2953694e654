"""Reads DeepSpeed's checkpoints parameter by parameter, from any number of ranks, and puts them into a new engine.

ZeRO-1 and 2 lay the parameters of a group one after the other, and a rank has an equal share of the whole. ZeRO-3 cuts
each parameter into equal shares, and a rank has its share of each, one after the other. DeepSpeed's universal
checkpoint (`ds_to_universal`) supports only Adam's states, and would have to be requested when a checkpoint is saved.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.train.checkpoints.by_name import SavedParameter, SavedParameters

Flat = Mapping[str, Tensor]
"""`weight` and the optimiser's state of a group on a rank: flat tensors of one length, and scalars."""

WEIGHT = "weight"


# Reading


def open_deepspeed(checkpoint: Path, names: Sequence[str], trained: Collection[str]) -> SavedParameters:
    """Return the saved state of each trained parameter and buffer of a checkpoint, for any stage of ZeRO.

    Args:
        checkpoint: the folder of the checkpoint.
        names: full names of the optimiser's parameters in its order; without ZeRO, its states are numbered.
        trained: full names of what trains in this run; other buffers are left out.

    Raises:
        ValueError: the shards of some ranks are missing, for example because nodes share no disk.
    """
    folder = checkpoint / checkpoint.joinpath("latest").read_text(encoding="utf-8").strip()
    model_file, *_ = _in_order_of_ranks(folder, "*_model_states.pt")
    model_state: dict[str, Any] = torch.load(model_file, map_location="cpu", mmap=True, weights_only=False)
    module = model_state["module"]
    saved_buffers = module.keys() & set(model_state["buffer_names"]) & set(trained)
    buffers = {name: SavedParameter(module[name], {}) for name in saved_buffers}
    optimizer_files = _in_order_of_ranks(folder, "*_optim_states.pt")
    if not optimizer_files:
        states = model_state["optimizer"]["state"]
        whole = {
            name: SavedParameter(module[name], _tensors(states.get(index, {}))) for index, name in enumerate(names)
        }
        return SavedParameters(whole | buffers, (whole | buffers).__getitem__)
    if len(optimizer_files) != (number := model_state["dp_world_size"]):
        raise ValueError(
            f"{folder}: it has the shards of {len(optimizer_files)} of {number} ranks, and all are needed to change "
            "ranks. Copy the shards of all nodes into it, or resume with the ranks and the sharding that wrote it"
        )
    ranks = [
        torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
        for file in optimizer_files
    ]
    shapes: list[dict[str, torch.Size]] = model_state["param_shapes"]
    places = _places_in_shares(shapes, ranks) if ranks[0]["zero_stage"] == 3 else _places_in_groups(shapes, ranks)

    def read(name: str) -> SavedParameter:
        """Read a parameter, or a buffer, with the optimiser's state of it."""
        return buffers[name] if name in buffers else places[name].read()

    return SavedParameters({**places, **buffers}, read)


def _in_order_of_ranks(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


@dataclass
class _Place:
    """Where a parameter is: slices `(flats, start, number)` of flat tensors that follow one another."""

    slices: list[tuple[Sequence[Flat], int, int]]
    shape: torch.Size

    def read(self) -> SavedParameter:
        """Assemble the parameter."""
        numel = self.shape.numel()
        values = {}
        for key, value in self.slices[0][0][0].items():
            if value.ndim != 1:  # a scalar
                values[key] = value
            else:
                values[key] = torch.cat([_cut([flat[key] for flat in flats], *cut) for flats, *cut in self.slices])
                values[key] = values[key][:numel].reshape(self.shape).clone()
        return SavedParameter(values.pop(WEIGHT), values)


def _cut(tensors: Sequence[Tensor], start: int, number: int) -> Tensor:
    """Return `number` elements from `start` on of tensors that follow one another."""
    pieces = []
    for tensor in tensors:
        begin, end = max(start, 0), min(start + number, tensor.numel())
        if begin < end:
            pieces.append(tensor[begin:end])
        start -= tensor.numel()
    return torch.cat(pieces) if pieces else tensors[0][:0]


def _places_in_groups(shapes: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Mapping[str, Any]]) -> dict:
    """Return full name -> place of each parameter under ZeRO-1 and 2."""
    places = {}
    for index, group in enumerate(shapes):
        flats = []
        for rank in ranks:
            weight = rank["single_partition_of_fp32_groups"][index]
            states = _tensors(rank["base_optimizer_state"]["state"].get(index, {}))
            # Weights are saved without the padding of the last rank, and states with it.
            flats.append({WEIGHT: weight, **{key: _without_padding(value, weight) for key, value in states.items()}})
        paddings = ranks[0].get("param_alignment_paddings")
        start = 0
        for number, (name, shape) in enumerate(group.items()):
            places[name] = _Place([(flats, start, shape.numel())], shape)
            start += shape.numel() + (paddings[index][number] if paddings else 0)
    return places


def _without_padding(state: Tensor, weight: Tensor) -> Tensor:
    return state[: weight.numel()] if state.ndim == 1 and state.numel() > weight.numel() else state


def _places_in_shares(shapes: Sequence[Mapping[str, torch.Size]], ranks: Sequence[Mapping[str, Any]]) -> dict:
    """Return full name -> place of each parameter under ZeRO-3."""
    all_flats: list[list[Flat]] = []
    for rank in ranks:
        states = rank["optimizer_state_dict"]["state"]
        all_flats.append(
            [
                {WEIGHT: weight, **_tensors(states.get(index, {}))}
                for index, weight in enumerate(rank["fp32_flat_groups"])
            ]
        )
    places, start = {}, 0
    for name, shape in chain.from_iterable(group.items() for group in shapes):
        share = -(-shape.numel() // len(ranks))
        places[name] = _Place([(flats, start, share) for flats in all_flats], shape)
        start += share
    return places


def _tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


# Writing


@torch.no_grad()
def put_into_engine(engine: Any, saved: Mapping[str, SavedParameter], checkpoint: Path) -> None:
    """Load trained parameters into an engine that has not stepped yet, for ZeRO stages 1 to 3.

    Raises:
        ValueError: the engine keeps optimiser states on disks.
    """
    zero = engine.optimizer
    if getattr(zero, "swap_optimizer", False):
        raise ValueError(
            f"{checkpoint}: optimiser states that are offloaded to a disk cannot be resharded "
            "(trainer.deepspeed.zero_optimization.offload_optimizer.device=nvme). Resume with the ranks and the "
            "sharding that wrote it"
        )
    names = engine.param_names
    on_device = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for flat, fragments in _fragments(zero):
        states: dict[str, Tensor] = {}
        for parameter, own, begin, number in fragments:
            item = saved[names[parameter]]
            flat.narrow(0, own, number).copy_(item.weight.flatten()[begin : begin + number])
            for key, value in item.states.items():
                if value.shape != item.weight.shape:
                    states[key] = value.clone().to(flat.device if on_device else value.device)
                    continue
                buffer = states.setdefault(key, torch.zeros_like(flat))
                buffer.narrow(0, own, number).copy_(value.flatten()[begin : begin + number])
        zero.optimizer.state[flat] = states
    _copy_weights(engine.module, saved)
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    engine.global_steps = step  # DeepSpeed names the folders of its checkpoints by it


def _fragments(zero: Any) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int, int, int]]]]:
    """Yield this rank's flat weights of each group, with the parts of parameters in it.

    A part consists of a parameter, its start in the flat weights, its start in the parameter, and its number of
    elements. Parameters of which the rank holds nothing are included with 0 elements.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            fragments, start = [], 0
            for parameter in group:
                share = parameter.partition_numel()
                begin = min(torch.distributed.get_rank() * share, parameter.ds_numel)
                fragments.append((parameter, start, begin, min(share, parameter.ds_numel - begin)))
                start += share
            yield flat, fragments
        return
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True):
        fragments = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is None:
                fragments.append((parameter, 0, 0, 0))
            else:
                whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append((parameter, own.start, whole.start, own.numel))
        yield flat, fragments


def _copy_weights(model: nn.Module, saved: Mapping[str, SavedParameter]) -> None:
    """Copy weights into a model, whose parameters ZeRO-3 gathers one after the other."""
    import deepspeed  # slow to import, and only runs under it need it

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in saved:
            continue
        if hasattr(tensor, "ds_id"):
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.data.copy_(saved[name].weight)
        else:
            tensor.data.copy_(saved[name].weight)
