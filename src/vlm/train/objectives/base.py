"""The interface of an objective: what a run trains its model to do.

To add one, subclass `Objective` in a file of this package, name the class in `table.OBJECTIVES`, and choose it in a YAML
with `trainer.objective`; `docs/extending.md` has an example. The top of an objective's file imports no torch: what the
objective refuses is said before torch loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlm.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Sampler

    from vlm.data.encoding.sample_encoder import SampleEncoder
    from vlm.train.trainer import VLMTrainer


class Objective(ABC):
    """What a run learns. `train/run.py` calls the methods in the order in which they stand here.

    Attributes:
        config: the run's configuration.
        row_key: the input of a batch that has one row for each sample.
    """

    row_key: ClassVar[str] = "input_ids"

    def __init__(self, config: RunConfig):
        self.config = config

    # Before torch is imported.

    @abstractmethod
    def refusals(self) -> Iterator[str]:
        """Yield what contradicts the objective in the configuration: the key, its value, what to do."""

    def training_keys(self) -> dict[str, str]:
        """Return what trains besides the parts that the configuration names: part -> the `key=value` that says so."""
        return {}

    # The data and the model.

    @abstractmethod
    def make_encoder(self, model_config: Any, processor: Any) -> SampleEncoder:
        """Return what turns a sample into ids and labels; `vlm data show` and `stats` use it too."""

    # The training step, called by `VLMTrainer`.

    @abstractmethod
    def compute_loss(
        self, trainer: VLMTrainer, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Return the loss of a batch, a scalar, and the model's outputs.

        Args:
            trainer: the run's trainer.
            model: the model as it is trained: wrapped by DeepSpeed or DDP where they are used.
            inputs: a batch on the device, as the objective's collator made it.
            num_items_in_batch: supervised tokens of the whole step on all ranks; None: the loss is a mean of the batch.
        """

    def make_train_sampler(self, trainer: VLMTrainer, dataset: Any) -> Sampler[int] | None:
        """Return the order of the training samples; None: as `trainer.train_sampling_strategy` says."""
        return None

    @abstractmethod
    def evaluate(self, trainer: VLMTrainer, dataset: Any) -> dict[str, float]:
        """Return the metrics of a data set by name, without the prefix `eval_`; every rank makes the same calls."""

    # The end of the run.

    @abstractmethod
    def next_command(self, final: Path) -> str:
        """Return the command line that a user would try next with the finished checkpoint `final`."""
