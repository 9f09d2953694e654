"""Where the streams of a run are, in its checkpoints: a resumed run begins with the next record."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.data.block_shuffle import BlockPosition
from vlm.data.processor import SampleInputs
from vlm.data.stream import READER_POSITION, ReaderPosition, SampleStream


class StreamPositions:
    """Keeps where the readers of this rank are behind the batches that it has trained on.

    Data workers are ahead of that; where they are in the meantime does not count.

    Args:
        stream: the stream that this rank trains on.
        args: the run's.
    """

    def __init__(self, stream: SampleStream, args: TrainingArguments):
        self.stream, self.args = stream, args
        self.readers: dict[int, ReaderPosition] = {}
        self.last_reader = -1
        args.ignore_data_skip = True  # `Trainer` would read everything again

    def take(self, batches: Sequence[SampleInputs]) -> None:
        """Take the positions out of the batches of a step, which is trained before the next checkpoint."""
        for batch in batches:
            position: ReaderPosition = batch.pop(READER_POSITION)
            self.readers[position.reader], self.last_reader = position, position.reader

    @property
    def layout(self) -> dict[str, object]:
        """What a position depends on, by the keys that a user sets."""
        return {
            "the number of ranks": self.args.world_size,
            "trainer.dataloader_num_workers": self.args.dataloader_num_workers,
            "trainer.seed": self.stream.seed,
            "dataset.shuffle_buffer": self.stream.buffer,
            "the sources and their weights": [[source.name, source.weight] for source in self.stream.sources],
        }

    def save_to(self, checkpoint: Path) -> None:
        """Write this rank's positions."""
        readers = {number: position._asdict() for number, position in self.readers.items()}
        state = {"layout": self.layout, "last_reader": self.last_reader, "readers": readers}
        self._file(checkpoint).write_text(json.dumps(state), encoding="utf-8")

    def load_from(self, checkpoint: Path) -> None:
        """Read them, and let the stream go on there.

        Raises:
            ValueError: the checkpoint has none, or was written by other readers.
        """
        file = self._file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint}: it does not record the position in the stream ({file.name} is missing): an earlier "
                "version or fewer ranks wrote it. Resume with those, or start from its model with "
                "trainer.from_pretrained"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        for name, value in self.layout.items():
            if (before := state["layout"].get(name)) != value:
                raise ValueError(
                    f"{checkpoint}: a stream cannot be resumed after {name} changed, from {before} to {value}"
                )
        self.readers = {int(number): make_position(fields) for number, fields in state["readers"].items()}
        self.last_reader = state["last_reader"]
        self.stream.positions = dict(self.readers)
        self.stream.first_reader = self.last_reader + 1

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / stream_file(self.args.process_index)


def stream_file(rank: int) -> str:
    """Return the name of the file that holds a rank's positions."""
    return f"stream-{rank}.json"


def make_position(fields: Mapping[str, Any]) -> ReaderPosition:
    """Make a position of its fields as JSON has them."""
    sources = tuple(BlockPosition(*numbers) for numbers in fields["sources"])
    return ReaderPosition(**{**fields, "sources": sources, "pending": tuple(fields["pending"])})


class StreamEpoch(TrainerCallback):
    """Says how far a run on a stream is, as `Trainer` does where it begins: it counts from 0 where it is resumed."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Set the share of the run's steps that are done."""
        state.epoch = state.global_step / state.max_steps
