"""Skips the update of a step if the guard says so: in plain training, and within DeepSpeed's own step.

Under DeepSpeed, the backward pass of a step's last batch applies the update. Its optimisers skip the update if the
gradient norm is not finite. To skip a spike as well, the norm that they compute is replaced by infinity.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from vlm.train.guards.step_guard import StepGuard


class GuardedUpdate:
    """Asks the guard about each update.

    Args:
        guard: judges steps.
        accelerator: the trainer's.
    """

    def __init__(self, guard: StepGuard, accelerator: Accelerator):
        self.guard, self.accelerator = guard, accelerator
        self.was_judged = False

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine; None if training is without it."""
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return self.accelerator.deepspeed_engine_wrapped.engine if is_deepspeed else None

    def prepare(self) -> None:
        """Make DeepSpeed's optimiser ask the guard about updates that it would not skip by itself.

        Raises:
            ValueError: DeepSpeed is configured to apply gradients that are not finite, or cannot skip spikes.
        """
        engine = self.engine
        if engine is None:
            return
        optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
        if not getattr(optimizer, "check_grad_overflow", True) and engine.bfloat16_enabled():
            raise ValueError(
                "trainer.deepspeed.bf16.check_grad_overflow=false: DeepSpeed would apply gradients that are not "
                "finite; leave it out"
            )
        if self.guard.skips_spikes and engine.fp16_enabled():
            raise ValueError(
                "trainer.spike_action=skip: with DeepSpeed and fp16 it would lower the loss scale; train in bf16, "
                "leave trainer.deepspeed out, or trainer.spike_action=warn"
            )
        if stage == 3 and self.guard.skips_spikes:
            self._judge_norms_of_stage3(optimizer)
        elif stage in (1, 2) and self.guard.skips_spikes:
            self._judge_norm_of_stage2(optimizer)
        elif not hasattr(optimizer, "overflow"):
            self._judge_plain_optimizer(engine)
        elif stage == 0 and self.guard.skips_spikes:
            raise ValueError(
                "trainer.spike_action=skip: DeepSpeed cannot skip an update with trainer.deepspeed=zero0 in half "
                "precision; choose zero2, leave trainer.deepspeed out, or trainer.spike_action=warn"
            )

    def finish(self, model: nn.Module, norm: Tensor | float | None) -> bool:
        """Return whether the update is applied, between the gradient norm and the optimiser's step.

        If DeepSpeed has already applied or skipped it, return what it did.

        Args:
            model: the model. Its gradients are dropped if the update is skipped, so that no optimiser acts.
            norm: the norm of the gradient over all ranks, before clipping.
        """
        if self.was_judged:  # within DeepSpeed's step
            self.was_judged = False
            return bool(self.engine.was_step_applied())
        engine = self.engine
        if engine is not None and not engine.was_step_applied():
            norm = math.nan
        if norm is None:
            return True
        if isinstance(norm, DTensor):  # of FSDP2
            norm = norm.full_tensor()
        if not math.isfinite(norm) and self._scale_is_searched():
            return False
        applied = self.guard.judge(norm)
        if not applied and engine is None:
            for parameter in model.parameters():
                parameter.grad = None
        return applied

    def stops_schedule(self, norm: Tensor | float | None) -> bool:
        """Return whether `Trainer` leaves the learning rate unchanged at an update that the guard skipped.

        DeepSpeed has already skipped the update; float16's scaler will do so if the gradient is not finite.
        """
        if self.engine is not None:
            return self.accelerator.optimizer_step_was_skipped
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and norm is not None and not math.isfinite(norm)

    def _scale_is_searched(self) -> bool:
        """Return whether float16's loss scale was too high and was lowered. This is no fault; the update is skipped.

        At a scale of 1, or if the loss itself is not finite, a lower scale would not help.
        """
        engine, scaler = self.engine, self.accelerator.scaler
        if engine is not None and engine.fp16_enabled():
            is_dynamic, scale = engine.dynamic_loss_scale(), float(engine.optimizer.loss_scale)
        elif scaler is not None and scaler.is_enabled():
            is_dynamic, scale = True, float(scaler.get_scale())
        else:
            return False
        return is_dynamic and scale > 1 and self.guard.has_finite_losses()

    def _judge_within(self, norm: Tensor | float) -> bool:
        """Ask the guard within DeepSpeed's step if the norm is finite; otherwise DeepSpeed skips the update."""
        if not math.isfinite(norm) or norm < 0:
            return False
        self.was_judged = True
        return self.guard.judge(norm)

    def _judge_norm_of_stage2(self, optimizer: Any) -> None:
        compute: Callable[[], Tensor] = optimizer.scaled_global_norm

        def scaled_global_norm(*args: object, **kwargs: object) -> Tensor:
            """Return the norm, or infinity, as after an overflow, if the update is to be skipped."""
            norm = compute(*args, **kwargs)
            return norm if self._judge_within(norm / optimizer.loss_scale) else torch.full_like(norm, torch.inf)

        optimizer.scaled_global_norm = scaled_global_norm

    def _judge_norms_of_stage3(self, optimizer: Any) -> None:
        compute: Callable[[], list[Tensor]] = optimizer._get_norm_groups

        def get_norm_groups() -> list[Tensor]:
            """Return the norms of the groups, or infinity, as after an overflow, if the update is to be skipped."""
            norms = compute()
            total = torch.linalg.vector_norm(torch.stack([torch.as_tensor(norm).float() for norm in norms]))
            is_valid = all(float(norm) >= 0 for norm in norms)  # DeepSpeed says -1 for one that is not finite
            if is_valid and self._judge_within(total / optimizer.loss_scale):
                return norms
            return [torch.full_like(torch.as_tensor(norm), torch.inf) for norm in norms]

        optimizer._get_norm_groups = get_norm_groups

    def _judge_plain_optimizer(self, engine: Any) -> None:
        """Make an optimiser that DeepSpeed does not wrap, as in stage 0 in float32, skip updates and report it."""
        optimizer = engine.optimizer
        step = optimizer.step
        norms: list[Tensor] = []

        def clip() -> None:
            """Clip gradients and keep their norm for the guard."""
            norms.append(clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping()))

        def guarded_step(closure: Callable[[], float] | None = None) -> None:
            """Update the weights if the guard allows it."""
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = norms.pop() if norms else get_total_norm(gradients)
            optimizer._global_grad_norm = norm
            optimizer.overflow = not self.guard.judge(norm)
            self.was_judged = True
            if not optimizer.overflow:
                step(closure)

        engine.clip_fp32_gradients, optimizer.step, optimizer.overflow = clip, guarded_step, False
