"""Losses of a model that trains, for metrics of evaluation records: each rank computes those of its share."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from vlm.evaluation.loss_metrics import Collate
from vlm.models.text_loss import SupervisedScores
from vlm.train.objectives.base import Inputs, ObjectiveTrainer


@dataclass(frozen=True)
class TrainerLosses:
    """A `LossSource`: the model of a run, with the run's batches and ranks.

    Attributes:
        trainer: the run's trainer.
        compute_losses: computes losses of the run's model, not wrapped by DeepSpeed or DDP.
    """

    trainer: ObjectiveTrainer
    compute_losses: SupervisedScores

    @property
    def batch_size(self) -> int:
        """The number of rows of a batch on each rank."""
        return self.trainer.args.per_device_eval_batch_size

    def batches(self, dataset: Dataset[object], title: str, collate: Collate | None = None) -> Iterator[Inputs]:
        """Yield this rank's batches; see `LossSource`."""
        return self.trainer.evaluation_batches(dataset, title, collate)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all ranks, without those that fill up the last batch."""
        return self.trainer.accelerator.gather_for_metrics(tensor)
