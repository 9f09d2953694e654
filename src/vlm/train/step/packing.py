"""Packed rows in training: what lays out the steps of a run."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from vlm.data.batching.collator import Collator
from vlm.train.monitor.flops import StepFlops
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.step.step_packing import MicroBatchPacking, StepPacking, sample_costs


def make_step_packing(
    run: PreparedRun, objective: Objective, flops: StepFlops | None, gather: Callable[[Tensor], Tensor]
) -> StepPacking:
    """Return what lays out the steps of a run; `flops` are the same on all ranks, of which `gather` gathers rows."""
    costs = sample_costs(flops, run.model.config, run.data.train)
    average, most = objective.loss_average, objective.config.trainer.max_tokens_per_batch
    collate = objective.make_row_collator(run, costs, most)
    if collate is not None:
        return MicroBatchPacking(collate, most, objective.count_items, run.args, gather)
    return StepPacking(cast(Collator, run.collate), costs, most, average, run.args, gather)
