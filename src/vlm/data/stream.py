"""Records that are read one after the other: shuffled in a buffer, mixed by weight, without end.

Each data worker of each rank reads a share of its own. The order depends on the seed alone, so that a run which is
resumed and reads past what it has seen goes on as it would have.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vlm.config.schema import DatasetConfig
from vlm.data.dataset import Skipped, encode_sample
from vlm.data.encoding.labels import encode
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.records.open import value_or_bad_sample
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source, make_sources
from vlm.data.vision.images import read_media_sizes


class SampleStream(IterableDataset[Any]):
    """Encoded samples of one or several sources, read anew for every epoch, without end.

    Args:
        sources: where the samples come from; each is drawn from in proportion to its weight.
        buffer: how many records of each wait to be drawn from.
        seed: all that the order depends on.
        rank: which of the ranks this is.
        world_size: how many there are.
    """

    def __init__(self, sources: Sequence[Source], buffer: int, seed: int, rank: int, world_size: int):
        self.sources = list(sources)
        self.buffer = buffer
        self.seed, self.rank, self.world_size = seed, rank, world_size

    @property
    def has_videos(self) -> bool:
        """Whether the model may come to see videos: what a stream holds is not known before."""
        return self.processor.video_token is not None

    @property
    def processor(self) -> Any:
        """The run's processor."""
        return self.sources[0].encoder.processor

    def __iter__(self) -> Iterator[Any]:
        """Ids, labels and pixels of one sample after the other; `Skipped` for a record that cannot be used."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        shard, num_shards = self.rank * workers + number, self.world_size * workers
        draw = random.Random(f"{self.seed} {shard}")
        streams = [self._shuffled_records(source, shard, num_shards, draw) for source in self.sources]
        weights = [source.weight for source in self.sources]
        while True:
            place = draw.choices(range(len(streams)), weights)[0]
            yield self._encode_or_skip(self.sources[place], next(streams[place]))

    def samples(self, max_samples: int) -> list[Sample]:
        """The first samples that can be used, in the order in which they stand."""
        found: list[Sample] = []
        for source in self.sources:
            for record in source.stream(0, 1, None):
                sample = value_or_bad_sample(source.read, record)
                if isinstance(sample, Sample):
                    found.append(sample)
                if len(found) >= max_samples:
                    return found
        return found

    def _shuffled_records(self, source: Source, shard: int, num_shards: int, draw: random.Random) -> Iterator[Any]:
        """A source's records, epoch after epoch, drawn from a buffer."""
        epoch = 0
        while True:
            waiting: list[Any] = []
            seen = 0
            for record in source.stream(shard, num_shards, self.seed + epoch):
                seen += 1
                waiting.append(record)
                if len(waiting) > self.buffer:
                    yield _pop_random(waiting, draw)
            while waiting:
                yield _pop_random(waiting, draw)
            if not seen:
                raise ValueError(
                    f"{source.path}: no record for reader {shard + 1} of {num_shards} (ranks times "
                    "trainer.dataloader_num_workers); use fewer"
                )
            epoch += 1

    def _encode_or_skip(self, source: Source, record: Any) -> dict[str, Any] | Skipped:
        try:
            return encode_sample(source, source.read(record))
        except BadSample as error:
            return Skipped.from_error(error, source)


def open_stream(
    config: DatasetConfig, encoder: SampleEncoder, *, seed: int, rank: int, world_size: int
) -> SampleStream:
    """The stream of a run's sources, once the first records of each were looked at.

    Raises:
        ValueError: a source does not open or is empty, or one of its first records cannot be used.
    """
    stream = SampleStream(make_sources(config, encoder), config.shuffle_buffer, seed, rank, world_size)
    for source in stream.sources:
        record = next(source.stream(0, 1, None), None)
        if record is None:
            raise ValueError(f"{source.path}: there is no record in it")
        sample = value_or_bad_sample(source.read, record)
        if not isinstance(sample, BadSample):
            encode(source.encoder.processor, sample, read_media_sizes(sample, source.encoder.processor))
    return stream


def _pop_random(waiting: list[Any], draw: random.Random) -> Any:
    """One of those that wait, the last put in its place."""
    place = draw.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()
