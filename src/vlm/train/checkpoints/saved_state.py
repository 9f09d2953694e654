"""State of a run in its checkpoints besides weights, optimiser, scheduler and random numbers."""

from pathlib import Path
from typing import Protocol


class SavedWithCheckpoint(Protocol):
    """What a run needs to continue exactly, such as the position of a stream; see `VLMTrainer.saved_with_checkpoint`.

    Both methods are called on every rank; if ranks have different state, each puts its rank into its file's name.
    """

    def save_to(self, checkpoint: Path) -> None:
        """Write files into a checkpoint that is not complete yet."""
        ...

    def load_from(self, checkpoint: Path) -> None:
        """Read these files, before the first batch of a resumed run."""
        ...
