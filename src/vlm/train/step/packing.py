"""Packed rows in training: which families are refused, and what lays out the steps of a run."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from vlm.assembly.packed_rows import PACKING_KEY
from vlm.data.batching.collator import Collator
from vlm.families.table import FAMILIES, get_family
from vlm.train.monitor.flops import StepFlops
from vlm.train.objectives.base import Objective, PreparedRun
from vlm.train.step.step_packing import MicroBatchPacking, StepPacking, sample_costs


def check_packing_support(model_type: str) -> None:
    """Refuse families that see more of a row than restarted positions keep apart.

    Raises:
        ValueError: a model of this type cannot be trained on packed rows.
    """
    family = get_family(model_type)
    if family.supports_packing is False:
        cannot = ", ".join(name for name, row in FAMILIES.items() if row.supports_packing is False)
        raise ValueError(
            f"{PACKING_KEY} {family.name} ({model_type}) cannot keep the samples of a row apart, as {cannot} "
            "cannot; other families and composed models can. trainer.packing=false pads batches instead, and "
            "trainer.train_sampling_strategy=group_by_modality_blocks pads them least"
        )


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
