"""Reads the checkpoints that a run resumes from; `saving.py` writes them.

A checkpoint of another world, with other ranks or other sharding, is read parameter by parameter, see `reshard`.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from vlm.train.checkpoints.deepspeed_shards import put_into_engine
from vlm.train.checkpoints.find import require_own_checkpoint, set_aside_later
from vlm.train.checkpoints.reshard import open_parameters, put_parameters
from vlm.train.checkpoints.saving import SCHEDULER, SavingTrainer
from vlm.train.checkpoints.sharded import load_sharded, saved_names
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS, trained_tensors
from vlm.train.checkpoints.world import read_world
from vlm.train.sharding import shard_model


class CheckpointTrainer(SavingTrainer):
    """A `Trainer` that resumes from its checkpoints, also from those of another world."""

    optimized_names: list[str]  # full names of the optimiser's parameters, in its order

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: None = None) -> None:
        """Load a checkpoint's trained weights; the run must train the same parameters.

        Checkpoints of another layout, and of FSDP2, are read once the model is prepared.
        """
        if self.is_sharded or self._has_other_layout(Path(resume_from_checkpoint)):
            return
        path = Path(resume_from_checkpoint, TRAINED_WEIGHTS)
        if not path.is_file():
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it has no {TRAINED_WEIGHTS}; a checkpoint "
                "that DeepSpeed wrote must be resumed with the same trainer.deepspeed."
            )
        state = load_file(path)
        self._check_trains_the_same(path.parent, state.keys())
        trained = trained_tensors(self.model, self.parts)
        if different := [name for name in sorted(state) if state[name].shape != trained[name].shape]:
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: the shapes of its weights differ from "
                f"those of this run, for example {different[:3]}. Resume with its own model and trainer.lora."
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
        if self.is_sharded:
            shard_model(self.model, self.parts, self.args)
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        has_other_layout = self._has_other_layout(checkpoint)
        if not (self.is_deepspeed_enabled or self.is_sharded or has_other_layout):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        require_own_checkpoint(checkpoint, Path(str(self.args.output_dir)))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if has_other_layout:
            self._load_other_layout(checkpoint)
        elif self.is_sharded:
            self._check_trains_the_same(checkpoint, saved_names(checkpoint))
            load_sharded(checkpoint, trained_tensors(self.model, self.parts), self.plain_optimizer)
        else:
            loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise ValueError(
                    f"trainer.resume_from_checkpoint={resume_from_checkpoint}: DeepSpeed did not write it, and "
                    "this run uses DeepSpeed. Resume with the trainer.deepspeed of the checkpoint."
                )
        self._load_schedule(checkpoint)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As usual; with another number of ranks, the random numbers of all ranks start from the seed."""
        saved = None if checkpoint is None else read_world(Path(checkpoint))
        if saved is None or saved.ranks == self.world.ranks:
            super()._load_rng_state(checkpoint)

    # --- another world ------------------------------------------------------------------------------------------

    def _has_other_layout(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint was written with another number of ranks or other sharding."""
        saved = read_world(checkpoint)
        return saved is not None and saved.layout != self.world.layout

    def _load_other_layout(self, checkpoint: Path) -> None:
        """Load the trained parameters of another world into the prepared model and its optimiser."""
        trained = trained_tensors(self.model, self.parts)
        saved = open_parameters(checkpoint, self.optimized_names, trained)
        self._check_trains_the_same(checkpoint, saved.keys())
        if self.world.sharding in ("zero1", "zero2", "zero3"):
            put_into_engine(self.model_wrapped, saved, checkpoint)
        else:
            put_parameters(trained, self.plain_optimizer, saved)

    def _load_schedule(self, checkpoint: Path) -> None:
        """Go on with a checkpoint's learning rates."""
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _check_trains_the_same(self, checkpoint: Path, saved: Collection[str]) -> None:
        trained = trained_tensors(self.model, self.parts).keys()
        if different := sorted(trained ^ set(saved)):
            raise ValueError(
                f"trainer.resume_from_checkpoint={checkpoint}: it has other trained parameters than this run, for "
                f"example {different[:3]}. Resume with its own trainer.unfreeze and trainer.lora."
            )
