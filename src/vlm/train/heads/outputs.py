"""The outputs of prediction heads for whole data sets, and what is measured of them while a run trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_losses import head_loss
from vlm.train.objectives.base import Inputs, ObjectiveTrainer


@dataclass(frozen=True)
class HeadOutputs:
    """The outputs of a head for the samples that have a label.

    Attributes:
        outputs: `(N, K)`, its numbers.
        targets: `(N,)`, of `multilabel` `(N, C)`.
        ranking_groups: `(N,)`, the groups of `pairwise`; None for other tasks.
        loss: the mean loss.
    """

    outputs: np.ndarray
    targets: np.ndarray
    ranking_groups: np.ndarray | None
    loss: float


def collect_outputs(trainer: ObjectiveTrainer, dataset: Any) -> dict[str, HeadOutputs]:
    """Return the outputs of each head for every sample of a data set that has a label for it, in order."""
    gathered: list[Inputs] = []
    for inputs in trainer.evaluation_batches(dataset, "evaluating"):
        results = {name: inputs.pop(name) for name in ("labels", "groups")}
        inputs.pop("text_labels", None)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            results["outputs"] = trainer.model(**inputs).outputs
        gathered.append(trainer.accelerator.gather_for_metrics(results))
    return {head.name: _make_head_outputs(head, gathered) for head in trainer.model.config.settings}


def _make_head_outputs(head: HeadSettings, gathered: Sequence[Inputs]) -> HeadOutputs:
    """Return the outputs of one head, out of gathered batches."""
    outputs = torch.cat([batch["outputs"][head.name] for batch in gathered]).float().cpu()
    targets = torch.cat([batch["labels"][head.name] for batch in gathered]).float().cpu()
    groups = torch.cat([batch["groups"] for batch in gathered]).cpu()
    known = ~targets.isnan().any(dim=1)
    outputs, targets, groups = outputs[known], targets[known], groups[known]
    loss = head_loss(
        head.task, head.loss, (outputs - head.shift) / head.scale, (targets - head.shift) / head.scale, groups=groups,
        weights=head.class_weights, options=head.loss_options,
    )  # fmt: skip
    return HeadOutputs(
        outputs.double().numpy(),
        (targets if head.task == "multilabel" else targets[:, 0]).double().numpy(),
        groups.numpy() if head.task == "pairwise" else None,
        loss.item(),
    )


def concatenate_outputs(parts: Sequence[HeadOutputs]) -> HeadOutputs:
    """Return the outputs for several sets of samples as those for one set."""
    groups = [part.ranking_groups for part in parts if part.ranking_groups is not None]
    return HeadOutputs(
        np.concatenate([part.outputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(groups) if groups else None,
        loss=float(np.average([part.loss for part in parts], weights=[len(part.outputs) for part in parts])),
    )


def head_metrics(heads: Sequence[HeadSettings], head_outputs: dict[str, HeadOutputs]) -> dict[str, float]:
    """Return loss and metrics of each head, without intervals; `<head>_<metric>` where there are several heads."""
    metrics = {}
    for head in heads:
        outputs = head_outputs[head.name]
        prefix = "" if len(heads) == 1 else f"{head.name}_"
        measured = scores(
            head.task, outputs.outputs, outputs.targets, Calibration(), groups=outputs.ranking_groups, num_resamples=0
        )
        metrics[f"{prefix}loss"] = outputs.loss
        metrics |= {f"{prefix}{name}": score.value for name, score in measured.items() if score.value is not None}
    return metrics
