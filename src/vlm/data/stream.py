"""Streams of records: read in sequence, shuffled in blocks, mixed by weight, without end.

Each data worker of each rank is a reader with a shard of its own. The order depends on the seed alone. A batch says
where its reader is after it (`ReaderPosition`), so that a resumed run begins with the next record.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final, Generic, NamedTuple, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.block_shuffle import BlockPosition, BlockShuffle
from vlm.data.dataset import SAMPLE_REF, SampleRef, encode_sample
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.processor import Processor, SampleInputs
from vlm.data.records.positions import Position, value_or_bad_sample
from vlm.data.sample import BadSample, Sample
from vlm.data.skipped import Skipped
from vlm.data.sources import Source, make_sources
from vlm.data.vision.images import read_media_sizes

T = TypeVar("T")

NO_RECORD: Final = object()
"""Stands where a source has no further record; a record itself may be anything, such as JSON's `null`."""

READER_POSITION: Final = "reader_position"
"""The key of a batch's `ReaderPosition`; the training loop takes it out."""


class ReaderPosition(NamedTuple):
    """Where a reader continues.

    Attributes:
        reader: the reader's number on its rank: that of its data worker.
        drawn: number of records that it had drawn where `sources` are.
        sources: where it is in each source.
        until: number of records that it has drawn.
        pending: numbers, from `drawn` on, of the records before `until` that are in no batch yet.
    """

    reader: int
    drawn: int
    sources: tuple[BlockPosition, ...]
    until: int
    pending: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draw:
    """A record that a reader has drawn.

    Attributes:
        source: where it is from.
        record: the record.
        before: where the reader was before it.
        after: where the reader is after it.
        is_repeated: whether it was drawn before the run was resumed, and is in no batch yet.
    """

    source: Source
    record: object
    before: ReaderPosition
    behind: ReaderPosition
    is_repeated: bool = False

    @property
    def number(self) -> int:
        """The number of the draw, from 0."""
        return self.before.drawn

    def encode(self) -> SampleInputs | Skipped:
        """Return the encoded sample, or `Skipped` for a record that cannot be used."""
        try:
            sample = self.source.read(self.record)
            return {
                **encode_sample(self.source, sample),
                SAMPLE_REF: SampleRef(self.source.shown_path, None, sample.id),
            }
        except BadSample as error:
            return Skipped.from_error(error, self.source)


@dataclass(frozen=True)
class Positioned(Generic[T]):
    """A value, and where its reader continues after it."""

    value: T
    position: ReaderPosition


@dataclass(eq=False)
class SampleStream(IterableDataset[SampleInputs | Skipped]):
    """Encoded samples of one or several sources, read again for every epoch, without end.

    They come from the sources in proportion to their weights, and are shuffled in blocks of `buffer` records of each.

    Attributes:
        positions: where the readers of this rank continue, by their numbers; one that is not there begins.
        first_reader: the reader whose batch comes first.
    """

    sources: Sequence[Source]
    buffer: int
    seed: int
    rank: int
    world_size: int
    positions: Mapping[int, ReaderPosition] = field(default_factory=dict)
    first_reader: int = 0

    @property
    def has_videos(self) -> bool:
        """Whether there may be videos that the model reads as such: the content of a stream is not known beforehand."""
        return self.processor.videos is not None

    @property
    def processor(self) -> Processor:
        """The run's processor."""
        return self.sources[0].encoder.processor

    def __iter__(self) -> Iterator[SampleInputs | Skipped]:
        """Iterate over encoded samples, with `Skipped` for a record that cannot be used."""
        return (draw.encode() for draw in self.draws())

    def draws(self) -> Iterator[Draw]:
        """Iterate over this reader's records, from where it continues; those that have been in a batch do not come.

        Raises:
            ValueError: a source has no record for this reader.
        """
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        number = (number + self.first_reader) % workers
        shard, num_shards = self.rank * workers + number, self.world_size * workers
        resumed = self.positions.get(number)
        if resumed is None:
            resumed = ReaderPosition(number, 0, (BlockPosition(),) * len(self.sources), 0)
        sources = zip(self.sources, resumed.sources, strict=True)
        records = [
            BlockShuffle(partial(self._open_epoch, source, shard, num_shards), self.buffer, seed, position)
            for seed, (source, position) in zip(self._block_seeds(shard), sources, strict=True)
        ]
        position = resumed._replace(until=resumed.drawn, pending=())
        while True:
            chosen = self._choose_source(shard, position.drawn)
            record = next(records[chosen], NO_RECORD)
            if record is NO_RECORD:
                raise ValueError(
                    f"{self.sources[chosen].path}: no record for reader {shard + 1} of {num_shards} (ranks times "
                    "trainer.dataloader_num_workers); use fewer"
                )
            before, drawn = position, position.drawn + 1
            position = ReaderPosition(number, drawn, tuple(shuffle.position for shuffle in records), drawn)
            is_new = before.drawn >= resumed.until
            if is_new or before.drawn in resumed.pending:
                yield Draw(self.sources[chosen], record, before, position, is_repeated=not is_new)

    def _block_seeds(self, shard: int) -> list[str]:
        return [f"{self.seed} {index} {shard}" for index in range(len(self.sources))]

    def _open_epoch(
        self, source: Source, shard: int, num_shards: int, epoch: int, start: Position
    ) -> Iterator[tuple[object, Position]]:
        return source.stream_from(start, shard, num_shards, self.seed + epoch)

    def _choose_source(self, shard: int, number: int) -> int:
        """Return which source a draw is from; it depends on the number of the draw alone."""
        if len(self.sources) == 1:
            return 0
        weights = [source.weight for source in self.sources]
        return random.Random(f"{self.seed} {shard} {number}").choices(range(len(weights)), weights)[0]

    def samples(self, max_samples: int) -> list[Sample]:
        """Return the first samples that can be used, in order."""
        read = (value_or_bad_sample(source.read, record) for source in self.sources for record in source.stream())
        return list(islice((sample for sample in read if isinstance(sample, Sample)), max_samples))


@dataclass(eq=False)
class PositionedStream(IterableDataset[Positioned[SampleInputs | Skipped]]):
    """The samples of a stream, each with the position of its reader."""

    stream: SampleStream

    def __iter__(self) -> Iterator[Positioned[SampleInputs | Skipped]]:
        return (Positioned(draw.encode(), draw.behind) for draw in self.stream.draws())


@dataclass(eq=False)
class PositionedCollator:
    """Makes batches that say under `READER_POSITION` where their reader is after them.

    Attributes:
        collate: makes a batch of values.
    """

    collate: Callable[[Any], Mapping[str, Any]]

    def __call__(self, items: Sequence[Positioned[Any]] | Positioned[Any]) -> dict[str, Any]:
        """Collate values, or what a single item holds."""
        if isinstance(items, Positioned):
            return {**self.collate(items.value), READER_POSITION: items.position}
        return {**self.collate([item.value for item in items]), READER_POSITION: items[-1].position}


def open_stream(
    config: DatasetConfig, encoder: SampleEncoder, *, seed: int, rank: int, world_size: int
) -> SampleStream:
    """Open the stream of a run's sources and check the first record of each.

    Raises:
        ValueError: a source does not open or is empty, or its first record cannot be used and the policy is `error`.
    """
    stream = SampleStream(make_sources(config, encoder), config.shuffle_buffer, seed, rank, world_size)
    for source in stream.sources:
        record = next(source.stream(), NO_RECORD)
        if record is NO_RECORD:
            raise ValueError(f"{source.shown_path}: it holds no records")
        try:
            sample = source.read(record)
            source.encoder.encode(sample, read_media_sizes(sample, source.encoder.processor))
        except BadSample as error:
            if config.on_bad_sample == "error":
                raise Skipped.from_error(error, source).as_error(source) from error
    return stream
