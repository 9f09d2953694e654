"""Writes the checkpoints of a run, which hold what trains, and the finished model.

A checkpoint has the weights that train (`trained.safetensors`; under DeepSpeed its own files), the states of optimiser,
scheduler and random numbers, and the manifest of all of these. `writer.py` says how each is there whole or not at all.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm.assembly.adapter_base import Base
from vlm.assembly.adapter_folder import save as save_on_base
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.saving import save_complete
from vlm.config.schema import TrainerOptions
from vlm.data.processor import Processor
from vlm.families.table import get_part_names
from vlm.train.checkpoints import sizes
from vlm.train.checkpoints.best import BEST_FOLDER, BestModel
from vlm.train.checkpoints.find import remove_old_checkpoints, require_own_checkpoint, set_aside_later
from vlm.train.checkpoints.saved_state import SavedWithCheckpoint
from vlm.train.checkpoints.writer import FolderWriter, OutOfStepError, SaveError
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.parts import Part

log = logging.getLogger(__name__)

TRAINED_WEIGHTS = "trained.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Files of a checkpoint, named as `Trainer` reads them."""


class CheckpointTrainer(Trainer):
    """A `Trainer` that saves what trains while it trains, and a model with its processor at the end."""

    processor: Processor
    parts: list[Part]
    options: TrainerOptions
    saved_with_checkpoint: list[SavedWithCheckpoint]  # what a run needs to go on besides what `Trainer` saves
    best_model: BestModel | None  # which evaluation was the best; None: it is not kept
    base: Base | None  # what the result is written on top of (adapters, quantised parts); None: the result is whole
    writer: FolderWriter | None = None  # of the checkpoint that is being written

    # `Trainer` declares these as unions; here each is what a run makes it.
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any

    # --- the whole model ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, see `save_whole_model`; within a checkpoint, only what trains."""
        if output_dir is None:
            raise ValueError("save_model needs a folder: the run directory itself holds no model")
        if _internal_call:
            self._save_trained_weights(Path(output_dir))
        else:
            self.save_whole_model(Path(output_dir))

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """Save the model with its processor, whole or on top of its base; every rank calls this.

        Args:
            folder: its folder in the run directory, which is there when all of it is.
            write_more: called on every rank with the folder before it gets its name, to write files of its own there.

        Raises:
            SaveError: it could not be written; a model that was there before is as it was.
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
            state = self.accelerator.get_state_dict(self.model_wrapped)  # on every rank: ZeRO-3 gathers
            with writer.recording():
                if is_writer:
                    save_complete(self.model, folder, state)
        with writer.recording():
            if is_writer:
                self.processor.save_pretrained(folder)

    def _make_writer(self, target: Path) -> FolderWriter:
        is_first_of_node = self.args.local_process_index == 0
        return FolderWriter(target, is_leader=self.args.should_save, is_first_of_node=is_first_of_node)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save a checkpoint, and only then remove older ones; before it, the model of the best evaluation.

        Raises:
            SaveError: it could not be written, and `trainer.on_save_error` is `stop`.
        """
        run_directory, step, best = Path(str(self.args.output_dir)), self.state.global_step, self.best_model
        try:
            if best is not None and best.is_new(step):
                self._export_best(best, run_directory / BEST_FOLDER)
            self._write_checkpoint(run_directory / f"{PREFIX_CHECKPOINT_DIR}-{step}", model, trial)
        except SaveError as error:
            if self.options.on_save_error == "stop":
                raise
            if self.args.process_index == 0:
                log.error("%s. The run goes on, as trainer.on_save_error=continue says", error)
            return
        if self.args.should_save:
            remove_old_checkpoints(run_directory, self.args.save_total_limit, None if best is None else best.step)

    def _export_best(self, best: BestModel, folder: Path) -> None:
        try:
            self.save_whole_model(folder, best.save_to)
        except SaveError:
            best.revert()  # the folder has the best model before this one
            raise
        log.info("%s holds the model of %s", folder, best.describe())

    def _write_checkpoint(self, checkpoint: Path, model: torch.nn.Module, trial: None) -> None:
        self.writer = writer = self._make_writer(checkpoint)
        try:
            writer.begin(self._checkpoint_bytes(checkpoint.parent))
            with writer.recording():  # behind the first file that cannot be written, ranks wait for each other no more
                super()._save_checkpoint(model, trial)
            for state in self.saved_with_checkpoint:
                with writer.recording():
                    state.save_to(writer.folder)
            writer.finish(self.state.global_step)
        finally:
            self.writer = None

    def _get_output_dir(self, trial: None) -> str:
        """Return the folder in which `Trainer` makes the folders of checkpoints."""
        return super()._get_output_dir(trial) if self.writer is None else str(self.writer.folder.parent)

    def _checkpoint_bytes(self, run_directory: Path) -> int:
        """Return how many bytes this rank will write, about."""
        leads, is_sharded = self.args.should_save, self.is_deepspeed_enabled
        previous = sizes.previous_checkpoint_bytes(run_directory)
        if previous is None:
            trained = trained_tensors(self.model, self.parts).values()
            return sizes.new_checkpoint_bytes(trained, self.optimizer, leads=leads, is_sharded=is_sharded)
        return previous if leads else 0

    def _save_trained_weights(self, folder: Path) -> None:
        if self.args.should_save and not self.is_deepspeed_enabled:  # DeepSpeed writes weights beside its states
            state = {name: t.detach().contiguous() for name, t in trained_tensors(self.model, self.parts).items()}
            with self._current_writer().recording():
                save_file(state, folder / TRAINED_WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        writer, folder = self._current_writer(), Path(output_dir)
        if self.is_deepspeed_enabled:
            from vlm.train.checkpoints.deepspeed_engine import save_deepspeed_checkpoint  # only its runs need it

            try:
                save_deepspeed_checkpoint(self.model_wrapped, writer)
            except OSError as error:
                raise OutOfStepError(f"{writer.target} could not be saved: {error}") from error
        elif self.args.should_save:
            writer.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        if self.args.should_save:
            writer.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _current_writer(self) -> FolderWriter:
        assert self.writer is not None, "parts of a checkpoint are written while one is saved"
        return self.writer

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """Ask for a checkpoint where an evaluation is the best so far, and that is kept; every rank calls this."""
        step = self.state.global_step
        if self.best_model is not None and self.is_in_train and step > 0:  # before the first step nothing has trained
            self.control.should_save |= self.best_model.update(broadcast_from_rank0(metrics), step)

    # --- resuming -----------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: None = None) -> None:
        """Put a checkpoint's trained weights over those that the run began with; both must train the same."""
        path = Path(resume_from_checkpoint, TRAINED_WEIGHTS)
        if not path.is_file():
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: no {TRAINED_WEIGHTS} in it; a checkpoint "
                "written under DeepSpeed is resumed with the same trainer.deepspeed."
            )
        state = load_file(path)
        trained = {name: tensor.shape for name, tensor in trained_tensors(self.model, self.parts).items()}
        saved = {name: tensor.shape for name, tensor in state.items()}
        if different := sorted({name for name, _ in trained.items() ^ saved.items()}):
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it does not train what this run does, for "
                f"example {different[:3]}. Resume with the trainer.unfreeze and trainer.lora that it was made with."
            )
        self.model.load_state_dict(state, strict=False)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader]:
        """As usual; DeepSpeed checkpoints are read although they lack the frozen parameters."""
        prepared = self._prepare_as_usual(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            for state in self.saved_with_checkpoint:
                state.load_from(Path(resume_from_checkpoint))
            set_aside_later(Path(resume_from_checkpoint), Path(str(self.args.output_dir)))
        return prepared

    def _prepare_as_usual(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader]:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        require_own_checkpoint(Path(resume_from_checkpoint), Path(str(self.args.output_dir)))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        if loaded is None:
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it was not written under DeepSpeed, and "
                "this run trains with it. Resume with the trainer.deepspeed that it was made with."
            )
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared


def trained_tensors(model: TrainableModel, parts: list[Part]) -> dict[str, Tensor]:
    """Return what training changes: parameters with a gradient, and the saved buffers of parts that train."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names, saved = get_part_names(model.config), model.state_dict().keys()
    training = {part.name for part in parts if part.is_trainable}
    buffers = {name: b for name, b in model.named_buffers() if name in saved and names.part_of(name) in training}
    return {**parameters, **buffers}
