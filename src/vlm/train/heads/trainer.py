"""The `Trainer` for models with prediction heads: another loss, and evaluation by what heads say of each sample."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.trainer_utils import speed_metrics

from vlm.data.batching.collator import SKIPPED_KEY
from vlm.data.batching.samplers import GROUP_BY_MODALITY_LENGTH, GroupSampler
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_metrics import scores
from vlm.models.head_losses import head_loss
from vlm.train.arguments import sampler_seed
from vlm.train.trainer import VLMTrainer


@dataclass(frozen=True)
class HeadOutputs:
    """What a head says of samples that have a label.

    Attributes:
        outputs: `(N, K)`, its numbers.
        targets: `(N,)`, of `multilabel` `(N, C)`.
        compared: `(N,)`, the groups of `pairwise`; None of other tasks.
        loss: the mean.
    """

    outputs: np.ndarray
    targets: np.ndarray
    ranking_groups: np.ndarray | None
    loss: float


class HeadTrainer(VLMTrainer):
    """Trains heads, and whatever else of their model trains. Losses are means over samples of each micro-batch."""

    ROW_KEY = "groups"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The weighted sum of the heads' losses, and of that of the replies where they are learned.

        They are in a batch without any reply too, so that every rank's backward pass runs through the same modules.
        """
        if self.model.config.generation_weight and "labels" not in inputs:
            nothing = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
            inputs = {**inputs, "labels": nothing, "prompt_mask": inputs["attention_mask"]}
        outputs = model(**to_forward_kwargs(inputs))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As usual; rows that a ranking compares stand together, so that batches have pairs."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        has_ranking_head = any(one.task == "pairwise" for one in self.model.config.settings)
        if not has_ranking_head or self.sampling == GROUP_BY_MODALITY_LENGTH or (dataset.group_indices < 0).all():
            return super()._get_train_sampler(train_dataset)
        self.sampler = GroupSampler(dataset.group_indices.tolist(), sampler_seed(self.args))
        return self.sampler

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and measures of each head, without intervals; `eval_<head>_<measure>` where there are several."""
        start = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        head_outputs = self.collect_outputs(dataset)
        metrics = {}
        for one in self.model.config.settings:
            found = head_outputs[one.name]
            prefix = metric_key_prefix if len(head_outputs) == 1 else f"{metric_key_prefix}_{one.name}"
            measured = scores(
                one.task, found.outputs, found.targets, Calibration(), groups=found.ranking_groups, num_resamples=0
            )
            metrics[f"{prefix}_loss"] = found.loss
            metrics |= {f"{prefix}_{name}": score.value for name, score in measured.items() if score.value is not None}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def collect_outputs(self, dataset: Any) -> dict[str, HeadOutputs]:
        """What each head says of every sample of a dataset that has a label for it, in order."""
        gathered: list[dict[str, Any]] = []
        loader = self.get_eval_dataloader(dataset)
        self.model.eval()
        for batch in tqdm(
            loader, "evaluating", leave=False, disable=self.args.disable_tqdm or not self.args.should_save
        ):
            for one in batch.pop(SKIPPED_KEY, []):
                raise one.as_error()
            inputs = self._prepare_inputs(batch)
            arguments = to_forward_kwargs(inputs)
            for name in ("labels", "groups", "text_labels"):
                arguments.pop(name, None)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model(**arguments).outputs
            part = {"outputs": outputs, "targets": inputs["targets"], "groups": inputs["groups"]}
            gathered.append(self.accelerator.gather_for_metrics(part))
        return {one.name: self._make_head_outputs(one, gathered) for one in self.model.config.settings}

    def _make_head_outputs(self, one: Any, gathered: list[dict[str, Any]]) -> HeadOutputs:
        """What one head says, out of gathered batches."""
        outputs = torch.cat([part["outputs"][one.name] for part in gathered]).float().cpu()
        targets = torch.cat([part["targets"][one.name] for part in gathered]).float().cpu()
        groups = torch.cat([part["groups"] for part in gathered]).cpu()
        known = ~targets.isnan().any(dim=1)
        outputs, targets, groups = outputs[known], targets[known], groups[known]
        loss = head_loss(
            one.task, one.loss, (outputs - one.shift) / one.scale, (targets - one.shift) / one.scale, groups=groups,
            weights=one.class_weights, options=one.loss_options,
        )  # fmt: skip
        return HeadOutputs(
            outputs.double().numpy(), (targets if one.task == "multilabel" else targets[:, 0]).double().numpy(),
            groups.numpy() if one.task == "pairwise" else None, loss.item(),
        )  # fmt: skip


def to_forward_kwargs(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the model's `forward` takes it."""
    names = {"targets": "labels", "labels": "text_labels"}
    return {names.get(name, name): value for name, value in batch.items()}
