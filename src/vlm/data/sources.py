"""A source: where records are, how one becomes a sample, and how a sample becomes ids and labels."""

import copy
import inspect
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from vlm.config.schema import DatasetConfig, MixtureSourceConfig, SourceConfig
from vlm.data.cache import json_digest, resolve_cache_folder
from vlm.data.encoding.labels import read_template
from vlm.data.encoding.sample_encoder import SampleEncoder, processor_digest
from vlm.data.records.formats import get_reader
from vlm.data.records.open import Records, open_records, stream_records
from vlm.data.sample import BadSample, ContentPart, Sample, Turn, VideoRef
from vlm.data.vision.video import sample_clip, sample_frame_refs


@dataclass
class Source:
    """Records of one file or data set, as samples.

    Attributes:
        name: what the log calls it.
        config: where the records are and how they are read.
        cache: the cache's folder.
        encoder: the run's, with the source's own template where it has one.
        max_frames: of a video.
        weight: how often its samples are taken.
    """

    name: str
    config: SourceConfig
    cache: Path
    encoder: SampleEncoder
    max_frames: int
    weight: float = 1.0

    def __post_init__(self):
        assert self.config.path is not None
        self.path = self.config.path
        place = Path(self.path)
        self.folder = Path(self.config.image_folder or (place if place.is_dir() else place.parent))
        options = {name: value for name, value in self.config.options.items() if value is not None}
        self._reader = partial(get_reader(self.config.format), **options)

    @cached_property
    def records(self) -> Records:
        """The records by number."""
        return open_records(self.path, self.cache, split=self.config.split, subset=self.config.subset)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> Sample:
        """The sample of a record.

        Raises:
            BadSample: it cannot be used.
        """
        return self.read(self.records[index])

    def stream(self, shard: int, num_shards: int, seed: int | None) -> Iterator[Any]:
        """A share of the records one after the other, read anew each time; a `BadSample` for one that is no record."""
        where = {"split": self.config.split, "subset": self.config.subset}
        return stream_records(self.path, self.cache, **where, shard=shard, num_shards=num_shards, seed=seed)

    def read(self, record: Any) -> Sample:
        """A record as a sample, with the source's system prompt; of videos it is settled what is seen of them.

        Raises:
            BadSample: it cannot be used.
        """
        if isinstance(record, BadSample):
            raise record
        try:
            sample = self._reader(record, self.folder)
        except BadSample:
            raise
        except Exception as error:  # whatever a reader of the user's own trips over belongs to this record
            name = str(record.get("id", "?")) if isinstance(record, dict) else "?"
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            raise BadSample(name, f"its reader raised {type(error).__name__}: {error} ({where})") from error
        prompt = self.config.system_prompt
        if prompt and sample.turns[0].role != "system":
            sample = replace(sample, turns=(Turn("system", (prompt,)), *sample.turns))
        return sample.with_videos(lambda video: self._parts_shown_for(video, sample.id))

    def _parts_shown_for(self, video: VideoRef, sample_id: str) -> tuple[ContentPart, ...]:
        return parts_for_video(video.path, self.max_frames, self.encoder.processor, sample_id)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that a sample's ids depend on: records, reader, processor, and the code in between."""
        reader = inspect.getsource(inspect.getmodule(get_reader(self.config.format)) or sys)
        settings = (self.config.format, self.config.options, str(self.folder), self.config.system_prompt)
        return json_digest(
            self.records.fingerprint, reader, settings, self.max_frames, processor_digest(self.encoder.processor),
            self.encoder.fingerprint_fields,
        )  # fmt: skip


def parts_for_video(path: Path, max_frames: int, processor: Any, sample_id: str) -> tuple[ContentPart, ...]:
    """What a model sees of a video: the video where its processor knows them, else frames as pictures.

    Raises:
        BadSample: it is no video.
    """
    if (videos := processor.videos) is None:
        return sample_frame_refs(path, max_frames, sample_id)
    return (VideoRef(path, sample_clip(path, max_frames, sample_id, min_frames=videos.min_frames(max_frames))),)


def make_sources(config: DatasetConfig, encoder: SampleEncoder) -> list[Source]:
    """The sources of a run: those that are named, or the one that `dataset.path` is."""
    cache = resolve_cache_folder(config.cache_dir)
    if not config.sources:
        assert config.path is not None
        return [Source(Path(config.path).name, config, cache, encoder, config.max_frames)]
    return [
        Source(name, replace(one, image_folder=one.image_folder or config.image_folder), cache,
               _encoder_with_template(encoder, one), config.max_frames, one.weight)
        for name, one in config.sources.items()
    ]  # fmt: skip


def _encoder_with_template(encoder: SampleEncoder, source: MixtureSourceConfig) -> SampleEncoder:
    """The encoder, rendering with the source's own template where it has one."""
    if source.template is None:
        return encoder
    processor = copy.copy(encoder.processor)
    own = source.template == "tokenizer"
    if own and processor.own_template is None:
        raise ValueError("dataset.sources: template=tokenizer, but the language model's tokenizer has no template")
    processor.chat_template = processor.own_template if own else read_template(source.template)
    return replace(encoder, processor=processor)
