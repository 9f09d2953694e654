"""Writes the checkpoints of a run, which hold what trains, and the finished model.

A checkpoint has the weights that train (`trained.safetensors`; DeepSpeed's own files under it; the folder `distributed`
under FSDP2), the states of optimiser, scheduler and random numbers, the world that wrote it (`world.json`), and, once
every rank is done with it, the file `complete`. Another world reads it parameter by parameter, see `reshard`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from vlm.assembly.adapter_base import Base
from vlm.assembly.adapter_folder import save as save_on_base
from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.saving import save_complete
from vlm.data.processor import Processor
from vlm.families.table import get_part_names
from vlm.train.checkpoints.deepspeed_shards import put_into_engine
from vlm.train.checkpoints.find import COMPLETE_MARK
from vlm.train.checkpoints.reshard import TRAINED_WEIGHTS, open_parameters, put_parameters
from vlm.train.checkpoints.saved_state import SavedWithCheckpoint
from vlm.train.checkpoints.sharded import load_sharded, save_sharded, saved_names
from vlm.train.checkpoints.world import World, read_world
from vlm.train.distributed import barrier
from vlm.train.parts import Part
from vlm.train.sharding import gather_state, original_class, reshard, shard_model

SCHEDULER = "scheduler.pt"


class CheckpointTrainer(Trainer):
    """A `Trainer` that saves what trains while it trains, and a model with its processor at the end."""

    processor: Processor
    parts: list[Part]
    saved_with_checkpoint: list[SavedWithCheckpoint]  # what a run needs to go on besides what `Trainer` saves
    world: World
    is_sharded: bool  # by FSDP2
    optimized_names: list[str]  # full names of the optimiser's parameters, in its order
    base: Base | None  # what the result is written on top of (adapters, quantised parts); None: the result is whole

    # `Trainer` declares these as unions; here each is what a run makes it.
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    accelerator: Any
    optimizer: Any

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
            # On every rank, since ZeRO-3 and FSDP2 gather.
            get_state = gather_state if self.is_sharded else self.accelerator.get_state_dict
            state = get_state(self.model_wrapped)
            if self.args.should_save:
                with original_class(self.model):
                    save_complete(self.model, folder, state)
        if self.args.should_save:
            self.processor.save_pretrained(folder)

    def _save_trained_weights(self, folder: Path) -> None:
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.is_deepspeed_enabled or self.is_sharded):  # which write weights beside optimiser states
            state = {name: t.detach().contiguous() for name, t in trained_tensors(self.model, self.parts).items()}
            save_file(state, folder / TRAINED_WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            self.world.write(Path(output_dir))
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_sharded:
            save_sharded(Path(output_dir), trained_tensors(self.model, self.parts), self._plain_optimizer)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

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
        """Put a checkpoint's trained weights over those that the run began with; both must train the same.

        Those of another layout, and of FSDP2, are read once the model is prepared.
        """
        if self.is_sharded or self._has_other_layout(Path(resume_from_checkpoint)):
            return
        path = Path(resume_from_checkpoint, TRAINED_WEIGHTS)
        if not path.is_file():
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: no {TRAINED_WEIGHTS} in it; a checkpoint "
                "written under DeepSpeed is resumed with the same trainer.deepspeed."
            )
        state = load_file(path)
        self._check_trains_the_same(path.parent, state.keys())
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
        if self.is_sharded:
            shard_model(self.model, self.parts, self.args)
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        has_other_layout = self._has_other_layout(checkpoint)
        if not (self.is_deepspeed_enabled or self.is_sharded or has_other_layout):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if has_other_layout:
            self._load_other_layout(checkpoint)
        elif self.is_sharded:
            self._check_trains_the_same(checkpoint, saved_names(checkpoint))
            load_sharded(checkpoint, trained_tensors(self.model, self.parts), self._plain_optimizer)
        else:
            loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise ValueError(
                    f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it was not written under DeepSpeed, and "
                    "this run trains with it. Resume with the trainer.deepspeed that it was made with."
                )
        self._load_schedule(checkpoint)
        return prepared

    # --- another world ------------------------------------------------------------------------------------------

    def _has_other_layout(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint's files are those of another number of ranks, or of another sharding."""
        saved = read_world(checkpoint)
        return saved is not None and saved.layout != self.world.layout

    def _load_other_layout(self, checkpoint: Path) -> None:
        """Put what trained in another world into the prepared model and its optimiser."""
        trained = trained_tensors(self.model, self.parts)
        saved = open_parameters(checkpoint, self.optimized_names, trained)
        self._check_trains_the_same(checkpoint, saved.keys())
        if self.world.sharding in ("zero1", "zero2", "zero3"):
            put_into_engine(self.model_wrapped, saved, checkpoint)
        else:
            put_parameters(trained, self._plain_optimizer, saved)

    def _load_schedule(self, checkpoint: Path) -> None:
        """Go on with a checkpoint's learning rates."""
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _check_trains_the_same(self, checkpoint: Path, saved: Collection[str]) -> None:
        trained = trained_tensors(self.model, self.parts).keys()
        if different := sorted(trained ^ set(saved)):
            raise ValueError(
                f"trainer.resume_from_checkpoint={checkpoint}: it does not train what this run does, for example "
                f"{different[:3]}. Resume with the trainer.unfreeze and trainer.lora that it was made with."
            )

    @property
    def _plain_optimizer(self) -> Optimizer:
        """The optimiser of the parameters themselves, out of the wrappers of accelerate and DeepSpeed."""
        return self.model_wrapped.basic_optimizer if self.is_deepspeed_enabled else self.optimizer.optimizer


def trained_tensors(model: TrainableModel, parts: list[Part]) -> dict[str, Tensor]:
    """Return what training changes: parameters with a gradient, and the saved buffers of parts that train."""
    reshard(model)  # pyright: ignore[reportArgumentType] - every such model is a module
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names, saved = get_part_names(model.config), model.state_dict().keys()
    training = {part.name for part in parts if part.is_trainable}
    buffers = {name: b for name, b in model.named_buffers() if name in saved and names.part_of(name) in training}
    return {**parameters, **buffers}
