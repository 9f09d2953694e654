"""State of a run that its checkpoints hold besides weights, optimiser, scheduler and random numbers."""

from pathlib import Path
from typing import Protocol


class SavedWithCheckpoint(Protocol):
    """What a run needs to continue exactly, such as the position of a stream; `VLMTrainer.saved_with_checkpoint` has
    all.

    Both methods are called on every rank; a rank that has something of its own names its file with its rank.
    """

    def save_to(self, checkpoint: Path) -> None:
        """Write files into a checkpoint that does not count as complete yet."""
        ...

    def load_from(self, checkpoint: Path) -> None:
        """Read them, before the first batch of a run that is resumed."""
        ...
