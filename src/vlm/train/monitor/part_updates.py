"""The gradient norm and the relative update of each part, at the steps that are logged.

`grad_norm/<part>` is the norm of a part's gradient before it is clipped; their squares add up to that of `grad_norm`.
`update_norm/<part>` is `||Δw|| / ||w||` of the trained weights of the part. About 1e-3 is usual; far less means that
the part hardly learns, far more that its weights change erratically. For tensors of more than `MAX_ELEMENTS` elements
it is estimated from that many evenly spaced elements, so that the cost hardly depends on the size of the model.

If weights are sharded (ZeRO, FSDP2), sums of squares are added up over ranks. With DeepSpeed's half-precision
optimisers of stage 0, neither norm is known, so neither is logged; updates of weights that are swapped to a disk are
not known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.train.guards.update import GuardedUpdate
from vlm.train.guards.weights import held_here
from vlm.train.parts import Part

MAX_ELEMENTS = 8192
"""The maximum number of elements of a tensor that an update is measured on."""
MAX_FLAT_ELEMENTS = 2**20
"""The maximum number of elements of a shard that DeepSpeed lays many tensors in."""
GROUP_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")
"""Methods of DeepSpeed's sharding optimisers that compute the norm of a parameter group in each step."""


class UpdatingTrainer(Protocol):
    """The attributes of the run's `VLMTrainer` that are used here."""

    args: TrainingArguments
    state: TrainerState
    parts: list[Part]
    guarded_update: GuardedUpdate
    new_groups: list[dict[str, object]]
    last_norm: Tensor | float | None


class DeepSpeedOptimizer(Protocol):
    """The attributes of DeepSpeed's optimisers that are used here; each stage of ZeRO has its own groups."""

    step: Callable[..., object]
    overflow: bool
    loss_scale: float
    bit16_groups: Sequence[object]
    single_partition_of_fp32_groups: Sequence[Tensor]
    fp16_groups: Sequence[object]
    fp32_partitioned_groups_flat: Sequence[Tensor]
    sub_group_to_group_id: Mapping[int, int]


class PartUpdates(TrainerCallback):
    """Measures the steps that are logged; `pop_metrics` returns the last measurements."""

    def __init__(self, trainer: UpdatingTrainer):
        self.trainer = trainer
        self._norms: dict[str, Tensor] = {}  # of gradients as they are applied
        self._before: dict[str, Tensor] = {}
        self._changes: dict[str, tuple[Tensor, Tensor]] = {}
        self._total: Tensor | float | None = None
        self._recorded: list[Tensor | float] = []
        self._is_measuring = False

    # --- when ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Measure within DeepSpeed's step if DeepSpeed drops the gradients at its end."""
        engine = self.trainer.guarded_update.engine
        if engine is None:
            return
        optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
        if stage in (1, 2, 3) and all(hasattr(optimizer, name) for name in GROUP_NORMS):
            self._measure_sharded(optimizer, stage)
        elif stage == 0 and isinstance(optimizer, torch.optim.Optimizer):
            self._measure_plain_engine(cast(DeepSpeedOptimizer, optimizer))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ):
        """Measure gradients, and store the weights before the update."""
        if self.trainer.guarded_update.engine is None and self.is_due():
            self._begin(self._trained())
            self._total = self.trainer.last_norm

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ):
        """Measure how the weights have changed."""
        if self.trainer.guarded_update.engine is None and self._is_measuring:
            self._end(self._trained())

    def is_due(self) -> bool:
        """Return whether the current step will be logged, as far as this is known before its end."""
        args, state = self.trainer.args, self.trainer.state
        step, interval = state.global_step + 1, int(state.logging_steps or 0)
        if args.logging_strategy != "steps":
            return False
        is_first = step == 1 and args.logging_first_step
        return is_first or step >= state.max_steps or (interval > 0 and step % interval == 0)

    # --- what ---------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """Return part -> its parameters that have a gradient, or had one when the step began."""
        if self._is_measuring:
            return self._measured
        found = {part.name: [p for p in part.parameters.values() if p.grad is not None] for part in self.trainer.parts}
        self._measured = {name: parameters for name, parameters in found.items() if parameters}
        return self._measured

    def _begin(self, trained: Mapping[str, Sequence[nn.Parameter]]) -> None:
        if not trained:
            return
        is_sharded = any(isinstance(p, DTensor) for parameters in trained.values() for p in parameters)
        gradients = {name: [held_here(p.grad) for p in own if p.grad is not None] for name, own in trained.items()}
        squares = {name: get_total_norm(own).float().square() for name, own in gradients.items()}
        squares = add_up(squares, self.trainer.args.device, is_sharded=is_sharded)
        self._norms = {name: square.sqrt() for name, square in squares.items()}
        self._before = {name: sample([held_here(p) for p in own], MAX_ELEMENTS) for name, own in trained.items()}
        self._is_sharded, self._is_measuring = is_sharded, True

    def _end(self, trained: Mapping[str, Sequence[Tensor]], limit: int = MAX_ELEMENTS) -> None:
        changed, sizes = {}, {}
        for name, own in trained.items():
            before = self._before[name]
            after = sample([held_here(p) for p in own], limit)
            changed[name], sizes[name] = (after - before).square().sum(), before.square().sum()
        device, is_sharded = self.trainer.args.device, self._is_sharded
        changed, sizes = (add_up(numbers, device, is_sharded=is_sharded) for numbers in (changed, sizes))
        self._changes = {name: (changed[name], sizes[name]) for name in changed}
        self._before, self._is_measuring = {}, False

    def pop_metrics(self) -> dict[str, float]:
        """Return what was measured since the last call; nothing if no step was due, or its update was left out."""
        metrics: dict[str, float] = {}
        if self._norms:
            clipped = torch.stack([norm.cpu() for norm in self._norms.values()]).norm()
            total = self._total.full_tensor() if isinstance(self._total, DTensor) else self._total
            scale = float(total) / float(clipped) if total is not None and clipped > 0 else 1.0
            metrics |= {f"grad_norm/{name}": float(norm) * scale for name, norm in self._norms.items()}
        for name, (changed, size) in self._changes.items():
            if size > 0:
                metrics[f"update_norm/{name}"] = float((changed / size).sqrt())
        self._norms, self._changes = {}, {}
        return metrics

    # --- within DeepSpeed's step --------------------------------------------------------------------------------

    def _measure_plain_engine(self, optimizer: DeepSpeedOptimizer) -> None:
        """Measure an optimiser that DeepSpeed does not wrap; the gradient is already clipped when it is called."""
        step = optimizer.step

        def measured_step(*args: object, **kwargs: object) -> object:
            """Update the weights; measure the update where it is due."""
            if self.is_due():
                self._begin(self._trained())
            result = step(*args, **kwargs)
            if self._is_measuring:
                self._end(self._trained())
                self._total = getattr(optimizer, "_global_grad_norm", None)
                if getattr(optimizer, "overflow", False):
                    self._norms, self._changes = {}, {}
            return result

        optimizer.step = measured_step

    def _measure_sharded(self, optimizer: DeepSpeedOptimizer, stage: int) -> None:
        """Measure parameter groups of which a rank has shards; DeepSpeed computes their norms anyway."""
        for name in GROUP_NORMS:
            setattr(optimizer, name, self._recording(getattr(optimizer, name)))
        step = optimizer.step

        def measured_step(*args: object, **kwargs: object) -> object:
            """Update the weights; measure the update where it is due."""
            if not self.is_due():
                return step(*args, **kwargs)
            shards = self._shards(optimizer, stage)
            self._before = {name: sample(own, MAX_FLAT_ELEMENTS) for name, own in shards.items()}
            self._is_sharded, self._is_measuring, self._recorded = True, True, []
            result = step(*args, **kwargs)
            self._end(shards, MAX_FLAT_ELEMENTS)
            if optimizer.overflow:
                self._changes = {}
            else:
                self._norms = self._norms_of_groups(optimizer, stage)
                self._total = None
            return result

        optimizer.step = measured_step

    def _recording(self, compute: Callable[..., Tensor | float]) -> Callable[..., Tensor | float]:
        def recorded(*args: object, **kwargs: object) -> Tensor | float:
            """Compute the norm of a group, and store it if the step is measured."""
            norm = compute(*args, **kwargs)
            if self._is_measuring:
                self._recorded.append(norm)
            return norm

        return recorded

    def _part_names(self, optimizer: DeepSpeedOptimizer, stage: int) -> list[str]:
        """Return the part of each of DeepSpeed's parameter groups; nothing if the groups have changed."""
        names = [str(group["name"]).split(".")[0] for group in self.trainer.new_groups]
        if stage == 3:
            numbers = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp16_groups))]
            return [names[number] for number in numbers] if all(n < len(names) for n in numbers) else []
        return names if len(names) == len(optimizer.bit16_groups) else []

    def _shards(self, optimizer: DeepSpeedOptimizer, stage: int) -> dict[str, list[Tensor]]:
        """Return part -> what this rank holds of its weights in full precision; nothing if a disk has it."""
        flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        shards: dict[str, list[Tensor]] = {}
        if any(tensor.numel() == 0 for tensor in flat):
            return {}
        for name, tensor in zip(self._part_names(optimizer, stage), flat, strict=False):
            shards.setdefault(name, []).append(tensor.detach())
        return shards

    def _norms_of_groups(self, optimizer: DeepSpeedOptimizer, stage: int) -> dict[str, Tensor]:
        """Return part -> the norm of its gradient, from the norms of its groups over all ranks."""
        names, scale = self._part_names(optimizer, stage), float(optimizer.loss_scale)
        squares: dict[str, float] = {}
        if len(names) != len(self._recorded):
            return {}
        for name, norm in zip(names, self._recorded, strict=True):
            squares[name] = squares.get(name, 0.0) + (float(norm) / scale) ** 2
        return {name: torch.tensor(square).sqrt() for name, square in squares.items()}


def sample(tensors: Sequence[Tensor], limit: int) -> Tensor:
    """Return evenly spaced elements of tensors, `(N,)` in float32, at most `limit` of each.

    They are scaled so that the sum of their squares estimates the sum over all elements.
    """
    parts = list(_sample_each(tensors, limit))
    return torch.cat([part.to(parts[0].device) for part in parts])


def _sample_each(tensors: Sequence[Tensor], limit: int) -> Iterator[Tensor]:
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.numel() <= limit:
            yield flat.to(torch.float32, copy=True)
            continue
        stride = -(-flat.numel() // limit)
        while gcd(stride, tensor.shape[-1]) > 1:  # else every row would give the same few columns
            stride += 1
        chosen = flat[::stride]
        yield chosen.float() * (flat.numel() / chosen.numel()) ** 0.5


def add_up(numbers: Mapping[str, Tensor], device: torch.device, *, is_sharded: bool) -> dict[str, Tensor]:
    """Return scalars, summed over ranks if weights are sharded; every rank has the same names.

    `device` is the device on which ranks exchange tensors.
    """
    if not is_sharded or not numbers or not dist.is_initialized():
        return dict(numbers)
    total = torch.stack([number.float().to(device) for number in numbers.values()])
    dist.all_reduce(total)
    return dict(zip(numbers, total.unbind(), strict=True))
