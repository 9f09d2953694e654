"""DeepSpeed's writing of checkpoints, through a `FolderWriter`. Imports DeepSpeed, which is slow."""

import os
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from vlm.train.checkpoints.writer import FolderWriter


class HashingCheckpointEngine(TorchCheckpointEngine):
    """Writes what DeepSpeed's own engine writes, hashed. It keeps errors, so that all ranks reach the next barrier."""

    def __init__(self, writer: FolderWriter, *, zipped: bool):
        CheckpointEngine.__init__(self)  # its own engine's would log a line for each checkpoint
        self.writer, self.zipfile_serialization = writer, zipped

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        with self.writer.recording():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: object, path: str) -> None:
        """Write a file."""
        self.writer.save(state_dict, Path(path), zipped=self.zipfile_serialization)


def save_deepspeed_checkpoint(engine: Any, writer: FolderWriter) -> None:
    """Let a `DeepSpeedEngine` write its checkpoint, without frozen parameters; called on every rank.

    Raises:
        OSError: DeepSpeed could not write a file of its own next to those; the ranks are out of step then.
    """
    own = engine.checkpoint_engine
    tag = f"global_step{engine.global_steps}"
    engine.checkpoint_engine = HashingCheckpointEngine(writer, zipped=own.zipfile_serialization)
    try:
        engine.save_checkpoint(str(writer.folder), tag, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = own
    if writer.is_leader:
        with writer.recording():
            (writer.folder / "latest").write_text(tag, encoding="utf-8")
