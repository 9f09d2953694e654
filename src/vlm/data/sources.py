"""A source: where records are, how a record becomes a sample, and how a sample becomes ids and labels."""

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from vlm.config.dataset_schema import DatasetConfig, SourceConfig
from vlm.config.secrets import mask
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.coordinates.writing import write_objects
from vlm.data.encoding.labels import read_template
from vlm.data.encoding.sample_encoder import SampleEncoder, processor_digest
from vlm.data.processor import Processor
from vlm.data.records.formats import get_reader
from vlm.data.records.keys import unread_keys
from vlm.data.records.open import Records, open_records, stream_with_positions
from vlm.data.records.positions import START, Position
from vlm.data.sample import ContentPart, Sample, Turn, VideoRef
from vlm.data.usable import RecordReader
from vlm.data.vision.frames import sample_clip, sample_frame_refs


class RecordPart(Protocol):
    """A part of a record's conversation."""

    def of(self, sample: Sample) -> Sample:
        """Return the part of the record's sample."""
        ...


@dataclass
class Source:
    """The records of one file or data set, as samples.

    The encoder is the run's, with the source's own template where it has one. At most `max_frames` frames are read of a
    video. An epoch takes each sample `weight` times. `allow_pipe` says whether the path may be a command. Files and
    messages name `shown_path`, which is `path` without secrets.

    Parts of records have the numbers after those of the records, see `add_part`.
    """

    name: str
    config: SourceConfig
    cache: Path
    encoder: SampleEncoder
    max_frames: int
    weight: float = 1.0
    allow_pipe: bool = False

    def __post_init__(self):
        """Find the reader that the configuration names, and where the images are."""
        assert self.config.path is not None
        self.path = self.config.path
        self.shown_path = mask(self.path)
        place = Path(self.path)
        self.folder = Path(self.config.image_folder or (place if place.is_dir() else place.parent))
        options = {name: value for name, value in self.config.options.items() if value is not None}
        self._reader = partial(get_reader(self.config.format), **options)
        self.parts: list[tuple[int, RecordPart]] = []

    def unread_keys(self, record: object) -> list[str]:
        """Return the keys of a record that its reader does not read, see `records.keys`."""
        return unread_keys(self._reader.func, record, self._reader.keywords)

    @cached_property
    def records(self) -> Records:
        """The records, by index."""
        return open_records(
            self.path,
            self.cache,
            split=self.config.split,
            subset=self.config.subset,
            follow_links=self.config.follow_links,
        )

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """Return the sample of a record.

        Raises:
            BadSample: it cannot be used.
        """
        if index >= len(self.records):
            record, part = self.parts[index - len(self.records)]
            return part.of(self.sample(record))
        return self.read(self.records[index])

    def add_part(self, record: int, part: RecordPart) -> int:
        """Return the number under which `sample` returns a part of a record from now on."""
        self.parts.append((record, part))
        return len(self.records) + len(self.parts) - 1

    def record_of(self, index: int) -> int:
        """Return the number of the record that a sample is of: its own, or that of which it is a part."""
        if not self.parts or index < len(self.records):
            return index
        return self.parts[index - len(self.records)][0]

    def stream(self, shard: int = 0, num_shards: int = 1, seed: int | None = None) -> Iterator[object]:
        """Iterate over a shard of the records, read again each time; a record that cannot be read is a `BadSample`."""
        return (record for record, _ in self.stream_from(START, shard, num_shards, seed))

    def stream_from(
        self, start: Position, shard: int = 0, num_shards: int = 1, seed: int | None = None
    ) -> Iterator[tuple[object, Position]]:
        """Iterate over a shard of the records from a position on, each with the position after it."""
        return stream_with_positions(
            self.path,
            self.cache,
            split=self.config.split,
            subset=self.config.subset,
            shard=shard,
            num_shards=num_shards,
            seed=seed,
            start=start,
            allow_pipe=self.allow_pipe,
            follow_links=self.config.follow_links,
        )

    def read(self, record: object) -> Sample:
        """Read a record as a sample, add the source's system prompt, write its objects as the model writes them, and
        choose the frames of its videos.

        Raises:
            BadSample: it cannot be used.
        """
        return self.parse(record).map_sides(self._prepare)

    def _prepare(self, sample: Sample) -> Sample:
        """Return a conversation as the model reads it, see `read`."""
        prompt, processor = self.config.system_prompt, self.encoder.processor
        if prompt and sample.turns[0].role != "system":
            sample = replace(sample, turns=(Turn("system", (prompt,)), *sample.turns))
        sample = write_objects(sample, processor)
        return sample.with_videos(
            lambda video: parts_for_video(video, self.max_frames, processor, sample.id, self.config.fps)
        )

    def parse(self, record: object) -> Sample:
        """Read a record as a sample; its blank replies are not learned.

        Raises:
            BadSample: it cannot be used.
        """
        config = self.config
        return RecordReader(self._reader, self.folder, config.format, config.options, config.follow_links)(record)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that a sample's ids depend on: records, reader, processor, and the code in between."""
        reader = inspect.getsource(inspect.getmodule(get_reader(self.config.format)) or sys)
        settings = (self.config.format, self.config.options, str(self.folder), self.config.system_prompt)
        encoding = (
            self.max_frames,
            self.config.fps,
            processor_digest(self.encoder.processor),
            self.encoder.fingerprint_fields,
        )
        return json_digest(self.records.fingerprint, reader, settings, *encoding)


def parts_for_video(
    video: VideoRef, max_frames: int, processor: Processor, sample_id: str, fps: float | None = None
) -> tuple[ContentPart, ...]:
    """Return the content that stands for a video: the video where the processor reads videos, else frames as images.

    Raises:
        BadSample: it is no video.
    """
    if (videos := processor.videos) is None:
        return sample_frame_refs(video, max_frames, sample_id, fps=fps)
    min_frames = videos.min_frames(max_frames)
    return (replace(video, clip=sample_clip(video, max_frames, sample_id, min_frames=min_frames, fps=fps)),)


def make_sources(config: DatasetConfig, encoder: SampleEncoder) -> list[Source]:
    """Make the sources of a run: those of `dataset.sources`, or the one of `dataset.path`."""
    cache = resolve_cache_folder(config.cache_dir)
    if not config.sources:
        assert config.path is not None
        name = Path(config.path).name
        return [Source(name, config, cache, encoder, config.max_frames, allow_pipe=config.allow_pipe)]
    sources = []
    for name, source in config.sources.items():
        folder, follows = source.image_folder or config.image_folder, source.follow_links or config.follow_links
        rate = source.fps or config.fps
        located = replace(source, image_folder=folder, follow_links=follows, fps=rate)
        own_encoder = _encoder_with_template(encoder, source.template)
        if source.loss_weight != 1:
            own_encoder = replace(own_encoder, factors=replace(encoder.factors, source=source.loss_weight))
        options = {"weight": source.weight, "allow_pipe": config.allow_pipe}
        sources.append(Source(name, located, cache, own_encoder, config.max_frames, **options))
    return sources


def _encoder_with_template(encoder: SampleEncoder, template: str | None) -> SampleEncoder:
    """Return the encoder with a source's own template, where it has one."""
    if template is None:
        return encoder
    processor = copy.copy(encoder.processor)
    processor.chat_template = processor.own_template if template == "tokenizer" else read_template(template)
    if processor.chat_template is None:
        raise ValueError("dataset.sources: template=tokenizer, but the language model's tokenizer has no template")
    return replace(encoder, processor=processor)
