"""Streams of records: read in sequence, shuffled in a buffer, mixed by weight, without end.

Each data worker of each rank reads a shard of its own. The order depends on the seed alone, so that a resumed run,
which skips the records that it has trained on, continues as if it had not been stopped.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from torch.utils.data import IterableDataset, get_worker_info

from vlm.config.schema import DatasetConfig
from vlm.data.dataset import Skipped, encode_sample
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.processor import Processor, SampleInputs
from vlm.data.records.open import value_or_bad_sample
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source, make_sources
from vlm.data.vision.images import read_media_sizes


class SampleStream(IterableDataset[SampleInputs | Skipped]):
    """Encoded samples of one or several sources, read anew for every epoch, without end.

    They come from the sources in proportion to their weights; `buffer` records of each are shuffled.
    """

    def __init__(self, sources: Sequence[Source], buffer: int, seed: int, rank: int, world_size: int):
        self.sources = list(sources)
        self.buffer = buffer
        self.seed, self.rank, self.world_size = seed, rank, world_size

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
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        shard, num_shards = self.rank * workers + number, self.world_size * workers
        generator = random.Random(f"{self.seed} {shard}")
        streams = [(source, self._shuffle(source, shard, num_shards, generator)) for source in self.sources]
        weights = [source.weight for source in self.sources]
        while True:
            source, records = generator.choices(streams, weights)[0]
            yield _encode_or_skip(source, next(records))

    def samples(self, max_samples: int) -> list[Sample]:
        """Return the first samples that can be used, in order."""
        read = (value_or_bad_sample(source.read, record) for source in self.sources for record in source.stream())
        return list(islice((sample for sample in read if isinstance(sample, Sample)), max_samples))

    def _shuffle(self, source: Source, shard: int, num_shards: int, generator: random.Random) -> Iterator[object]:
        """Iterate over a source's records, epoch after epoch, each drawn at random from a buffer."""
        for epoch in count():
            buffer: list[object] = []
            number = 0
            for number, record in enumerate(source.stream(shard, num_shards, self.seed + epoch), start=1):
                buffer.append(record)
                if number > self.buffer:
                    yield _pop_random(buffer, generator)
            while buffer:
                yield _pop_random(buffer, generator)
            if not number:
                raise ValueError(
                    f"{source.path}: no record for reader {shard + 1} of {num_shards} (ranks times "
                    "trainer.dataloader_num_workers); use fewer"
                )


def open_stream(
    config: DatasetConfig, encoder: SampleEncoder, *, seed: int, rank: int, world_size: int
) -> SampleStream:
    """Open the stream of a run's sources and check the first record of each.

    Raises:
        ValueError: a source does not open or is empty, or its first record cannot be used and the policy is `error`.
    """
    stream = SampleStream(make_sources(config, encoder), config.shuffle_buffer, seed, rank, world_size)
    for source in stream.sources:
        record = next(source.stream(), None)
        if record is None:
            raise ValueError(f"{source.path}: there is no record in it")
        try:
            sample = source.read(record)
            source.encoder.encode(sample, read_media_sizes(sample, source.encoder.processor))
        except BadSample as error:
            if config.on_bad_sample == "error":
                raise Skipped.from_error(error, source).as_error() from error
    return stream


def _encode_or_skip(source: Source, record: object) -> SampleInputs | Skipped:
    try:
        return encode_sample(source, source.read(record))
    except BadSample as error:
        return Skipped.from_error(error, source)


def _pop_random(buffer: list[object], generator: random.Random) -> object:
    """Remove a random item, and put the last one in its place."""
    place = generator.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
