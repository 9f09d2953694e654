"""Writes the checkpoints of a run, which hold the trained parameters, and the finished model.

A checkpoint has the weights that train (`trained.safetensors`; DeepSpeed's own files under it; the folder `distributed`
under FSDP2), the states of optimiser, scheduler and random numbers, the world that wrote it (`world.json`), and the
manifest of all of these. `writer.py` makes sure that each is either complete or absent.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm.assembly.adapter_base import Base
from vlm.assembly.adapter_folder import gather_tensors
from vlm.assembly.adapter_folder import save as save_on_base
from vlm.assembly.saving import save_complete
from vlm.config.schema import TrainerOptions
from vlm.data.processor import Processor
from vlm.train.checkpoints import sizes
from vlm.train.checkpoints.best import BEST_FOLDER, BestModel
from vlm.train.checkpoints.find import remove_old_checkpoints
from vlm.train.checkpoints.saved_state import SavedWithCheckpoint
from vlm.train.checkpoints.sharded import own_files, save_sharded, save_sharded_in_background
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS, trained_tensors
from vlm.train.checkpoints.world import World
from vlm.train.checkpoints.writer import FolderWriter, OutOfStepError, SaveError
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.parts import Part
from vlm.train.sharding import gather_state, original_class

log = logging.getLogger(__name__)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Files of a checkpoint, named as `Trainer` reads them."""


@dataclass(frozen=True)
class UnfinishedCheckpoint:
    """A checkpoint that does not have its manifest and its final name yet."""

    writer: FolderWriter
    step: int


class FinishSaving(TrainerCallback):
    """Finishes checkpoints that are written in the background, once all ranks have written them, or at the end."""

    def __init__(self, trainer: "SavingTrainer"):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Rename a checkpoint if it is completely written; the run does not wait for it."""
        unfinished = self.trainer.unfinished
        if unfinished is not None and unfinished.writer.is_written():
            self.trainer.finish_saving()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Wait for the last checkpoint."""
        self.trainer.finish_saving()


class SavingTrainer(Trainer):
    """A `Trainer` that saves trained parameters during training, and the model with its processor at the end."""

    processor: Processor
    parts: list[Part]
    options: TrainerOptions
    saved_with_checkpoint: list[SavedWithCheckpoint]  # what a run needs to continue besides what `Trainer` saves
    world: World
    is_sharded: bool  # by FSDP2
    best_model: BestModel | None  # which evaluation was the best; None: it is not kept
    base: Base | None  # what the result is written on top of (adapters, quantised parts); None: the result is whole
    writer: FolderWriter | None = None  # of the checkpoint that is being begun
    unfinished: UnfinishedCheckpoint | None = None  # one that is written, or being written in the background
    saving_group: dist.ProcessGroup | None = None  # of all ranks, for what they exchange in the background

    # `Trainer` declares these as unions; here each is what a run makes it.
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any

    # --- the whole model ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, see `save_whole_model`; within a checkpoint, only trained parameters."""
        if output_dir is None:
            raise ValueError("save_model needs a folder: the run directory itself holds no model")
        if _internal_call:
            self._save_trained_weights(Path(output_dir))
        else:
            self.save_whole_model(Path(output_dir))

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """Save the model with its processor, whole or on top of its base; every rank calls this.

        Args:
            folder: its folder in the run directory, which appears once it is complete.
            write_more: called on every rank with the folder before it gets its final name, to write further files.

        Raises:
            SaveError: it could not be written; an earlier model is unchanged.
        """
        writer = self._make_writer(folder)
        if self.base is None:
            num_bytes = sizes.model_bytes(self.model)
        else:
            num_bytes = sizes.tensor_bytes(trained_tensors(self.model, self.parts).values())
        writer.begin(num_bytes + sizes.OTHER_BYTES if writer.is_leader else 0)
        self._write_model(writer)
        if write_more is not None:
            with writer.recording():
                write_more(writer.folder)
        writer.finish()

    def _write_model(self, writer: FolderWriter) -> None:
        folder, is_writer = writer.folder, self.args.should_save
        if self.base is not None:
            new_rows = {name: min(part.new_tokens) for part in self.parts for name in part.rows}
            with writer.recording():
                save_on_base(self.model, folder, self.base, new_rows=new_rows, is_writer=is_writer)
        else:
            state = self._gather_whole_state()
            with writer.recording():
                if is_writer:
                    with original_class(self.model):
                        save_complete(self.model, folder, state)
        with writer.recording():
            if is_writer:
                self.processor.save_pretrained(folder)

    def _gather_whole_state(self) -> Mapping[str, Tensor]:
        """Return the model's whole state on each rank that writes it; every rank calls this to gather shards."""
        if self.args.save_on_each_node and self.world.sharding == "zero3":  # accelerate gathers on the first rank alone
            return gather_tensors(self.model, self.model.state_dict().keys(), keep=self.args.should_save)
        get_state = gather_state if self.is_sharded else self.accelerator.get_state_dict
        return get_state(self.model_wrapped)

    def _make_writer(self, target: Path, *, in_background: bool = False) -> FolderWriter:
        is_first_of_node = self.args.local_process_index == 0
        return FolderWriter(
            target, is_leader=self.args.should_save, is_first_of_node=is_first_of_node, in_background=in_background
        )

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save the model of the best evaluation, then a checkpoint, and only then remove older checkpoints.

        With `trainer.async_save`, its large files are written while the run continues, until `finish_saving`.

        Raises:
            SaveError: it could not be written, and `trainer.on_save_error` is `stop`.
        """
        self.finish_saving()
        run_directory, step, best = Path(str(self.args.output_dir)), self.state.global_step, self.best_model
        with self._as_on_save_error_says():
            if best is not None and best.is_new(step):
                self._export_best(best, run_directory / BEST_FOLDER)
            self._begin_checkpoint(run_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}", model, trial)
        if not self.options.async_save:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait until the checkpoint is completely written, and give it its final name; every rank calls this.

        Raises:
            SaveError: it could not be written, and `trainer.on_save_error` is `stop`.
        """
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is None:
            return
        with self._as_on_save_error_says():
            unfinished.writer.finish(unfinished.step)
            if self.args.should_save:
                folder, best = Path(str(self.args.output_dir)), self.best_model
                remove_old_checkpoints(folder, self.args.save_total_limit, None if best is None else best.step)

    @contextmanager
    def _as_on_save_error_says(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if self.options.on_save_error == "stop":
                raise
            if self.args.process_index == 0:
                log.error("%s. The run continues, because trainer.on_save_error=continue", error)

    def _export_best(self, best: BestModel, folder: Path) -> None:
        try:
            self.save_whole_model(folder, best.save_to)
        except SaveError:
            best.revert()  # the folder has the best model before this one
            raise
        log.info("%s now has the model of %s", folder, best.describe())

    def _begin_checkpoint(self, checkpoint: Path, model: torch.nn.Module, trial: None) -> None:
        """Write the files of a checkpoint, without its manifest and its final name."""
        self.writer = writer = self._make_writer(checkpoint, in_background=self.options.async_save)
        try:
            writer.begin(self._checkpoint_bytes(checkpoint.parent))
            with writer.recording():  # after the first file that cannot be written, ranks wait for each other no more
                super()._save_checkpoint(model, trial)
            for state in self.saved_with_checkpoint:
                with writer.recording():
                    state.save_to(writer.folder)
            self.unfinished = UnfinishedCheckpoint(writer, self.state.global_step)
        finally:
            self.writer = None

    def _get_output_dir(self, trial: None) -> str:
        """Return the folder in which `Trainer` makes the folders of checkpoints."""
        return super()._get_output_dir(trial) if self.writer is None else str(self.writer.folder.parent)

    def _checkpoint_bytes(self, run_directory: Path) -> int:
        """Return about how many bytes this rank will write."""
        leads = self.args.should_save
        previous = sizes.previous_checkpoint_bytes(run_directory)
        if previous is None:
            trained = trained_tensors(self.model, self.parts).values()
            return sizes.new_checkpoint_bytes(
                trained,
                self.optimizer,
                leads=leads,
                is_sharded=self.is_deepspeed_enabled or self.is_sharded,
                copies_weights=self.is_deepspeed_enabled,
            )
        return previous if leads else 0

    def _save_trained_weights(self, folder: Path) -> None:
        if self.args.should_save and not (self.is_deepspeed_enabled or self.is_sharded):  # else they are with states
            state = {name: t.detach().contiguous() for name, t in trained_tensors(self.model, self.parts).items()}
            writer = self._current_writer()
            state = writer.queue.hold(state)
            writer.write(lambda: save_file(state, folder / TRAINED_WEIGHTS), TRAINED_WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        writer, folder = self._current_writer(), Path(output_dir)
        if self.args.should_save:
            with writer.recording():
                self.world.write(folder)
        if self.is_deepspeed_enabled:
            from vlm.train.checkpoints.deepspeed_engine import save_deepspeed_checkpoint  # only its runs need it

            try:
                save_deepspeed_checkpoint(self.model_wrapped, writer)
            except OSError as error:
                raise OutOfStepError(f"{writer.target} could not be saved: {error}") from error
        elif self.is_sharded:
            with writer.recording():
                self._save_shards(writer, folder)
        elif self.args.should_save:
            writer.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        if self.args.should_save:
            writer.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _save_shards(self, writer: FolderWriter, folder: Path) -> None:
        trained, optimizer = trained_tensors(self.model, self.parts), self.plain_optimizer
        if not writer.queue.in_background:
            save_sharded(folder, trained, optimizer)
            return
        if self.saving_group is None and dist.is_initialized():
            self.saving_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        wait = save_sharded_in_background(folder, trained, optimizer, self.saving_group)
        writer.write(wait, own_files(self.args.process_index))

    def _current_writer(self) -> FolderWriter:
        assert self.writer is not None, "parts of a checkpoint are written while one is saved"
        return self.writer

    def _determine_best_metric(self, metrics: dict[str, float], trial: None) -> bool:
        """Return False: `note_evaluation` finds the best; `Trainer` would look for its checkpoint in `unfinished`."""
        return False

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """Request a checkpoint if this evaluation is the best so far, and the best is kept; every rank calls this."""
        step = self.state.global_step
        if self.best_model is not None and self.is_in_train and step > 0:  # before the first step nothing has trained
            self.control.should_save |= self.best_model.update(broadcast_from_rank0(metrics), step)

    @property
    def plain_optimizer(self) -> Optimizer:
        """The optimiser of the parameters, without the wrappers of accelerate and DeepSpeed."""
        return self.model_wrapped.basic_optimizer if self.is_deepspeed_enabled else self.optimizer.optimizer
