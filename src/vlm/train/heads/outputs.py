"""The outputs of prediction heads for whole data sets, and what is measured of them while a run trains."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm.data.cache import json_digest
from vlm.evaluation.bootstrap import flatten_scores
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.evaluation.record_sums import RecordSums
from vlm.models.configuration_prediction import HeadSettings
from vlm.models.head_losses import STEP_LOSSES, head_loss, row_losses
from vlm.train.objectives.base import Inputs, ObjectiveTrainer


@dataclass(frozen=True)
class HeadOutputs:
    """The outputs of a head for the samples that have a label.

    Attributes:
        outputs: `(N, K)`, its numbers.
        targets: `(N,)`, of `multilabel` `(N, C)`.
        ranking_groups: `(N,)`, the groups of `pairwise`; None for other tasks.
        loss: the mean loss.
        losses: the loss of each sample; of `pairwise`, those of all pairs of each group. None: they are not known.
    """

    outputs: np.ndarray
    targets: np.ndarray
    ranking_groups: np.ndarray | None
    loss: float
    losses: RecordSums | None = None

    def identify(self, records: str) -> str:
        """Return a digest of the samples: of their records, `records`, their targets and their groups."""
        columns = (self.targets, *([] if self.ranking_groups is None else [self.ranking_groups]))
        return json_digest(records, [hashlib.sha256(column.tobytes()).hexdigest() for column in columns])


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
    scaled = (outputs - head.shift) / head.scale, (targets - head.shift) / head.scale
    loss = head_loss(
        head.task, head.loss, *scaled, groups=groups, weights=head.class_weights, options=head.loss_options
    )
    return HeadOutputs(
        outputs.double().numpy(),
        (targets if head.task == "multilabel" else targets[:, 0]).double().numpy(),
        groups.numpy() if head.task == "pairwise" else None,
        loss.item(),
        _losses_by_unit(head, *scaled, groups),
    )


def _losses_by_unit(
    head: HeadSettings, outputs: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor
) -> RecordSums:
    """Return the loss of each sample; of a loss that compares them, those of the pairs of each group."""
    if head.task not in STEP_LOSSES:
        losses = row_losses(
            head.task, head.loss, outputs, targets, weights=head.class_weights, options=head.loss_options
        )
        return RecordSums(losses.double().numpy(), np.ones(len(losses)))
    sums, counts = [], []
    for group in groups.unique():
        own = groups == group
        counts.append(int((targets[own] > targets[own].T).sum()))
        loss = head_loss(
            head.task, head.loss, outputs[own], targets[own], groups=groups[own], options=head.loss_options
        )
        sums.append(loss.item() * counts[-1])
    return RecordSums(np.array(sums, np.float64), np.array(counts, np.float64))


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
    """Return loss and metrics of each head, the loss alone with an interval; `<head>_<metric>` where there are several.

    `<head>_loss_ci95` is half the width of the loss's 95% interval, see `record_sums`.
    """
    metrics = {}
    for head in heads:
        outputs = head_outputs[head.name]
        prefix = _prefix(heads, head)
        measured = scores(
            head.task, outputs.outputs, outputs.targets, Calibration(), groups=outputs.ranking_groups, num_resamples=0
        )
        if outputs.losses is not None:
            metrics |= flatten_scores({f"{prefix}loss": outputs.losses.score})
        metrics[f"{prefix}loss"] = outputs.loss
        metrics |= {f"{prefix}{name}": score.value for name, score in measured.items() if score.value is not None}
    return metrics


def record_losses(heads: Sequence[HeadSettings], head_outputs: dict[str, HeadOutputs]) -> dict[str, RecordSums]:
    """Return the loss of each head by record, by the name under which it is logged."""
    known = [(head, head_outputs[head.name].losses) for head in heads]
    return {f"{_prefix(heads, head)}loss": losses for head, losses in known if losses is not None}


def _prefix(heads: Sequence[HeadSettings], head: HeadSettings) -> str:
    return "" if len(heads) == 1 else f"{head.name}_"
