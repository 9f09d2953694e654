"""Writes the checkpoints of a run, which hold what trains, and the finished model.

A checkpoint has the weights that train (`trained.safetensors`; under DeepSpeed its own files), the states of optimiser,
scheduler and random numbers, and, once every rank is done with it, the file `complete`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from vlm.assembly.adapter_base import Base
from vlm.assembly.adapter_folder import save as save_on_base
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.saving import save_complete
from vlm.data.processor import Processor
from vlm.families.table import get_part_names
from vlm.train.checkpoints.find import COMPLETE_MARK
from vlm.train.checkpoints.saved_state import SavedWithCheckpoint
from vlm.train.distributed import barrier
from vlm.train.parts import Part

TRAINED_WEIGHTS = "trained.safetensors"


class CheckpointTrainer(Trainer):
    """A `Trainer` that saves what trains while it trains, and a model with its processor at the end."""

    processor: Processor
    parts: list[Part]
    saved_with_checkpoint: list[SavedWithCheckpoint]  # what a run needs to go on besides what `Trainer` saves
    base: Base | None  # what the result is written on top of (adapters, quantised parts); None: the result is whole

    # `Trainer` declares these as unions; here each is what a run makes it.
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    accelerator: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its processor, whole or on top of its base; within a checkpoint, only what trains."""
        folder = Path(output_dir or str(self.args.output_dir))
        if _internal_call:
            self._save_trained_weights(folder)
            return
        if self.base is not None:
            new_rows = {name: min(part.new_tokens) for part in self.parts for name in part.rows}
            save_on_base(self.model, folder, self.base, new_rows=new_rows, is_writer=self.args.should_save)
        else:
            state = self.accelerator.get_state_dict(self.model_wrapped)  # on every rank: ZeRO-3 gathers
            if self.args.should_save:
                save_complete(self.model, folder, state)
        if self.args.should_save:
            self.processor.save_pretrained(folder)

    def _save_trained_weights(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self.is_deepspeed_enabled:  # DeepSpeed writes weights beside its optimiser states
            state = {name: t.detach().contiguous() for name, t in trained_tensors(self.model, self.parts).items()}
            save_file(state, folder / TRAINED_WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save a checkpoint, mark it once every rank is done with it, and only then remove older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        checkpoint = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        for state in self.saved_with_checkpoint:
            state.save_to(checkpoint)
        barrier()
        if self.args.should_save:
            checkpoint.joinpath(COMPLETE_MARK).touch()
            rotate_checkpoints(output_dir=str(checkpoint.parent), save_total_limit=limit)

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
        return prepared

    def _prepare_as_usual(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader]:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
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
