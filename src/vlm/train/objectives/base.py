"""The interface of an objective: what a run trains its model to do.

To add one, subclass `Objective` in a file of this package (or `Generation`, where only the loss is another), name the
class in `table.OBJECTIVES`, and choose it in a YAML with `trainer.objective`; `docs/extending.md` has an example. The
top of an objective's file imports no torch: what an objective refuses is said before torch loads.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vlm.config.schema import RunConfig
from vlm.train.monitor.status import RunStatus

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Dataset, Sampler
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.utils import ModelOutput

    from vlm.data.batching.step_layout import SampleCosts
    from vlm.data.dataset import SampleDataset
    from vlm.data.encoding.sample_encoder import SampleEncoder
    from vlm.data.processor import Processor
    from vlm.data.stream import SampleStream
    from vlm.evaluation.record_sums import RecordSums
    from vlm.train.example_question import ExampleQuestion
    from vlm.train.parts import Part

Inputs = dict[str, Any]
"""Arguments of a model's `forward` by name: tensors, or tensors by the names of heads."""

Collate = Callable[[Sequence[Any]], Mapping[str, object]]
"""Makes a batch of a list of samples."""


@dataclass
class RunData:
    """The samples of a run.

    Attributes:
        train: the samples that train the model.
        evaluation: the samples of evaluations while it trains; None: there are none.
        records: the same by their role, for `data.json`: `train`, `eval` and others of the objective's.
        summary: how the records are divided, for the log; empty: nothing to say.
    """

    train: Dataset[object]
    evaluation: Dataset[object] | None
    records: Mapping[str, SampleDataset | SampleStream]
    summary: str = ""


@dataclass
class PreparedRun:
    """A run from the moment at which its model is ready to train.

    Attributes:
        folder: the run directory.
        args: the run's `TrainingArguments`.
        processor: the run's processor, saved with the model.
        model: the model, in evaluation mode until the trainer has it.
        parts: the model's parts, see `train/parts.py`.
        data: the samples.
        collate: makes a batch of a list of samples.
        status: what the run does now, for `status.json`.
    """

    folder: Path
    args: TrainingArguments
    processor: Processor
    model: PreTrainedModel
    parts: list[Part]
    data: RunData
    collate: Collate
    status: RunStatus = field(default_factory=RunStatus)


class ObjectiveTrainer(Protocol):
    """What an objective uses of the run's `VLMTrainer`.

    Attributes:
        model: the model, not wrapped by DeepSpeed or DDP.
        processor: the run's processor.
        args: the run's arguments.
        accelerator: gathers tensors of all ranks.
        state: where the run is.
        callback_handler: has the callbacks of the run, those of its trackers among them.
    """

    model: PreTrainedModel
    processor: Processor
    args: TrainingArguments
    accelerator: Any  # accelerate declares what it gathers as a union of everything
    state: TrainerState
    callback_handler: CallbackHandler

    def evaluation_batches(
        self, dataset: Dataset[object], title: str, collate: Collate | None = None
    ) -> Iterator[Inputs]:
        """Yield this rank's batches of a data set on the device; the model is in evaluation mode then.

        With `collate`, a batch holds what it makes of one item: inputs of the model under several names.
        """
        ...

    def mark_progress(self) -> None:
        """Tell the watchdog that a piece of work is done, where it takes long and is no batch."""
        ...

    def compute_loss_context_manager(self) -> AbstractContextManager[object]:
        """Return the context of the run's precision."""
        ...


class Objective(ABC):
    """What a run learns. `train/run.py` calls the methods in the order in which they stand here.

    An instance belongs to one run, and may keep what one method finds out for the next. Arguments of several methods:
    `model_config` is the configuration of the model, or of the body of one that `wrap_model` makes; `processor`, `args`
    and `trainer` are the run's, `run` is the run with its model, and `batch` is what the collator made.

    Attributes:
        config: the run's configuration.
        row_key: the input of a batch that has one row for each sample.
        loss_label: what the loss is, for plots.
        flops_note: why the operations of a step are not counted, for `speed.json`; None: they are counted.
        memory_note: why the memory of a step is measured and not predicted, for preflights; None: it is that of text
            generation.
        takes_loss_weights: whether `compute_loss` multiplies the loss at each position with the input `loss_weights`,
            where there is one; packed steps need that for `trainer.loss_average=micro_batch`.
        watch_losses: called in training with the losses at the supervised positions `(S,)`, before they are weighted,
            and the batch; None: nobody asks for them.
        record_sums: metric of the last evaluation, without `eval_` -> its sum and count of each record, which another
            run that is evaluated on the same records is compared by; `evaluate` sets it.
        packing_proofs: the proofs of a family's trial that packed rows need, see `assembly/family_trial/table.py`.
    """

    row_key: ClassVar[str] = "input_ids"
    loss_label: ClassVar[str] = "loss"
    flops_note: ClassVar[str | None] = None
    memory_note: ClassVar[str | None] = None
    takes_loss_weights: ClassVar[bool] = False
    packing_proofs: ClassVar[tuple[str, ...]] = ("packing",)
    watch_losses: Callable[[Tensor, Inputs], None] | None = None

    def __init__(self, config: RunConfig):
        self.config = config
        self.record_sums: Mapping[str, RecordSums] = {}

    # Before torch is imported.

    @abstractmethod
    def refusals(self) -> Iterator[str]:
        """Yield what contradicts the objective in the configuration: the key, its value, what to do."""

    def training_keys(self) -> dict[str, str]:
        """Return what trains besides the parts that the configuration names: part -> the `key=value` that says so."""
        return {}

    def metric_names(self) -> frozenset[str] | None:
        """Return the names of the metrics that `evaluate` may give; None: they are not known before."""
        return None

    # The data and the model.

    @abstractmethod
    def make_encoder(self, model_config: PreTrainedConfig, processor: Processor) -> SampleEncoder:
        """Return what turns a sample into ids and labels; `vlm data show` and `stats` use it too."""

    @abstractmethod
    def load_data(self, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments) -> RunData:
        """Return the samples; whatever is wrong with them is refused here, before weights are loaded.

        Args:
            model_config: the configuration of the model, or of the body of one that `wrap_model` makes.
            processor: the run's processor.
            args: the run's arguments: seed, rank, number of ranks.

        Raises:
            ValueError: a record cannot be used, or the objective does not go with this model.
        """

    def wrap_model(self, model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
        """Return the model that is trained, from the model with its loaded weights."""
        return model

    @abstractmethod
    def make_collator(self, processor: Processor, data: RunData, args: TrainingArguments) -> Collate:
        """Return what makes a batch of a list of samples; every rank's batches must run the same modules."""

    def make_row_collator(self, run: PreparedRun, costs: SampleCosts, max_tokens: int | None) -> Collate | None:
        """Return what makes the packed rows of a micro-batch; None: packed steps are rows of samples.

        Args:
            run: the run.
            costs: balances rows.
            max_tokens: the most tokens of a row; None: any number.
        """
        return None

    def before_training(self, run: PreparedRun) -> None:  # noqa: B027 - optional
        """Do what comes before training, such as computing the outputs of a frozen part; `run` may be changed."""

    # The trainer and its steps.

    @property
    def loss_average(self) -> str:
        """Return how losses of micro-batches are averaged: `token` or `micro_batch`, see `trainer.loss_average`."""
        return self.config.trainer.loss_average

    def callbacks(self, run: PreparedRun, trainer: ObjectiveTrainer) -> list[TrainerCallback]:
        """Return callbacks of the objective's own, besides those that every run has."""
        return []

    def write_first_batch(self, run: PreparedRun, batch: Inputs) -> None:
        """Write `first_batch.html`; called on the first rank with its first batch, before the forward pass."""
        from vlm.train.monitor.plots import write_first_batch

        write_first_batch(batch, run.processor, run.folder)

    def on_train_begin(self, trainer: ObjectiveTrainer) -> None:  # noqa: B027 - optional
        """Do what needs the model as it is trained, such as a pass of it; called before the first step.

        Here an objective proves what it takes for granted of a model, see `assembly/logit_proofs.py`.

        Raises:
            ValueError: the model is not what the objective needs.
        """

    def make_train_sampler(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> Sampler[int] | None:
        """Return the order of the training samples; None: as `trainer.train_sampling_strategy` says."""
        return None

    def count_items(self, inputs: Inputs) -> Tensor | None:
        """Return how many items of a batch the loss of a step is a mean over, where `loss_average` is `token`.

        None: its supervised tokens, each as often as the weight of its reply says.
        """
        return None

    @abstractmethod
    def compute_loss(
        self, trainer: ObjectiveTrainer, model: Module, inputs: Inputs, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, ModelOutput]:
        """Return the loss of a batch, a scalar, and the model's outputs.

        Args:
            trainer: the run's trainer.
            model: the model as it is trained: wrapped by DeepSpeed or DDP where they are used.
            inputs: a batch on the device, as the objective's collator made it. Where a packed row holds samples of
                several micro-batches whose means are averaged, `loss_weights` `(rows, tokens)` has the factor of the
                loss of each label; see `takes_loss_weights`.
            num_items_in_batch: supervised tokens of the whole step on all ranks, by which the sum of (weighted) losses
                is divided; None: the loss is a mean of the batch.
        """

    def training_metrics(self, trainer: ObjectiveTrainer) -> dict[str, float]:
        """Return what is logged beside the training loss, of the steps since the last log; every rank is asked."""
        return {}

    @abstractmethod
    def evaluate(self, trainer: ObjectiveTrainer, dataset: Dataset[object]) -> dict[str, float]:
        """Return the metrics of a data set by name, without the prefix `eval_`; every rank makes the same calls.

        Args:
            trainer: the run's trainer, whose `evaluation_batches` gives the batches.
            dataset: `RunData.evaluation`.
        """

    # The end of the run.

    def after_training(self, run: PreparedRun, trainer: ObjectiveTrainer) -> None:  # noqa: B027 - optional
        """Do what comes between training and saving the model, such as calibration and a report."""

    def after_saving(self, final: Path) -> None:  # noqa: B027 - optional
        """Do what comes once the finished checkpoint is in `final`; every rank calls it."""

    @abstractmethod
    def next_command(self, final: Path, example: ExampleQuestion) -> str:
        """Return the command line that a user would try next with the finished checkpoint `final`."""

    def next_commands(self, final: Path, example: ExampleQuestion) -> dict[str, str]:
        """Return purpose -> command line, of what a user would do next with the finished checkpoint `final`.

        `example` is a question that the run's records ask.
        """
        publish = shlex.join(["vlm", "push-to-hub", str(final), "--repo", "OWNER/NAME"])
        return {"ask it": self.next_command(final, example), "publish it": publish}
