"""Records as training samples: counted before anything trains, read and encoded when they are needed."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.blank_images import make_blank_medium
from vlm.data.encoding.labels import Encoded
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, MediaSize, Sample, group_reasons
from vlm.data.skipped import Skipped, check_skipped_share, find_unusable, skip_or_raise
from vlm.data.sources import Source, make_sources
from vlm.data.splitting import add_parts
from vlm.data.token_counts import count
from vlm.data.vision.images import Medium, media_sizes_from_opened, read_media_sizes
from vlm.data.vision.jpeg import decode_sample_images

log = logging.getLogger(__name__)

SAMPLE_REF: Final = "sample_ref"
"""The key of a sample's `SampleRef`; the collator takes it out."""


LOSS_WEIGHTS: Final = "loss_weights"
"""The key of how much the loss of each label of a sample counts: `(tokens,)`, float32; absent where all count 1."""


class SampleRef(NamedTuple):
    """Names a sample in messages: `record` is its index in the source, from 0, None in a stream; `id` its own name."""

    source: str
    record: int | None
    id: str


@dataclass(frozen=True)
class Contribution:
    """The contribution of a source to a run: the numbers of its records, and of those left out.

    `samples` are those of an epoch, repetitions included; `images` and `tokens` are theirs, image tokens included;
    `truncated` is the number of samples that are cut to `dataset.max_length`.
    """

    source: str
    path: str
    fingerprint: str
    records: int
    samples: int
    images: int
    tokens: int
    skipped: int
    truncated: int


class SampleDataset(Dataset[SampleInputs | Skipped]):
    """Encoded samples of one or several sources, whose lengths are known beforehand.

    Args:
        sources: where the samples come from.
        places: `(samples, 2)`: the index of each sample's source, and of its record or part of a record there.
        lengths: `(samples,)`: number of tokens, image tokens included.
        num_images: `(samples,)`: number of images and videos.
        has_videos: whether any sample has a video that the model reads as such.
        has_thinking: whether any sample has thinking that is read.
        skipped: the records that were left out.
        contributions: what each source contributes.
        labels: the label of each sample, see `Sample.label`; None if samples have none.
        groups: the group of each sample, see `Sample.group`; None if samples have none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        places: np.ndarray,
        lengths: np.ndarray,
        num_images: np.ndarray,
        *,
        has_videos: bool = False,
        has_thinking: bool = False,
        skipped: Iterable[Skipped] = (),
        contributions: Iterable[Contribution] = (),
        labels: Sequence[object] | None = None,
        groups: Sequence[str | None] | None = None,
    ):
        self.sources = list(sources)
        self.places = places
        self.lengths = lengths
        self.num_images = num_images
        self.has_videos = has_videos
        self.has_thinking = has_thinking
        self.skipped = list(skipped)
        self.contributions = list(contributions)
        self._labels_and_groups = labels, groups

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.places)

    def sample(self, index: int) -> Sample:
        """Return the conversation of a sample as it was read.

        Raises:
            BadSample: its record cannot be used any more.
        """
        source, record = self.places[index].tolist()
        return self.sources[source].sample(record)

    def __getitem__(self, index: int) -> SampleInputs | Skipped:
        """Return an encoded sample, or `Skipped` for a record that turns out to be unusable; loops must handle both."""
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            sample = source.sample(record)
            ref = SampleRef(source.shown_path, source.record_of(record), sample.id)
            return {**encode_sample(source, sample), SAMPLE_REF: ref}
        except BadSample as error:
            return Skipped.from_error(error, source, record)

    def blank(self) -> "BlankImageDataset":
        """Return the same samples with blank images."""
        return BlankImageDataset(self)

    def media_inputs(self, sample: Sample) -> tuple[Sequence[MediaSize], dict[str, torch.Tensor]]:
        """Return the sizes of a sample's images and videos, where the processor needs them, and the model's inputs.

        Raises:
            BadSample: an image does not open, or the processor refuses one.
        """
        processor = self.processor
        media = decode_sample_images(sample, processor)
        sizes = media_sizes_from_opened(sample.media, media, processor)

        def process_one(index: int) -> object:
            """Process one image or video alone, to find out which of them the processor refuses."""
            return processor.image_inputs(media[index : index + 1], sizes[index : index + 1])

        with processor_errors("the processor", sample.id, sample.media, process_one):
            return sizes, processor.image_inputs(media, sizes)

    def encoder_of(self, index: int) -> SampleEncoder:
        """Return what encodes a sample."""
        return self.sources[int(self.places[index, 0])].encoder

    def encoded(self, index: int, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Return the ids and labels of a sample; `sizes` of its images where the processor needs them."""
        source, record = self.places[index].tolist()
        return self.sources[source].encoder(self.sources[source].sample(record), sizes)

    @property
    def processor(self) -> Processor:
        """The run's processor."""
        return self.sources[0].encoder.processor

    @property
    def labels(self) -> Sequence[object]:
        """The label of each sample, see `Sample.label`."""
        labels, _ = self._labels_and_groups
        return [None] * len(self) if labels is None else labels

    @property
    def groups(self) -> Sequence[str | None]:
        """The group of each sample, see `Sample.group`."""
        _, groups = self._labels_and_groups
        return [None] * len(self) if groups is None else groups

    def subset(self, indices: Sequence[int] | np.ndarray) -> "SampleDataset":
        """Return the samples at these indices as a dataset."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self.places[chosen], self.lengths[chosen], self.num_images[chosen]
        labels, groups = self._labels_and_groups
        if labels is not None:
            labels = [labels[index] for index in chosen.tolist()]
        if groups is not None:
            groups = [groups[index] for index in chosen.tolist()]
        return SampleDataset(
            self.sources,
            *rows,
            has_videos=self.has_videos,
            has_thinking=self.has_thinking,
            labels=labels,
            groups=groups,
        )


class BlankImageDataset(Dataset[SampleInputs]):
    """The same samples, with every image and every frame of a video in the processor's mean colour."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> SampleInputs:
        """Return a sample encoded with blank images of the sizes of its own."""
        number, record = self.dataset.places[index].tolist()
        source = self.dataset.sources[number]
        return encode_blank_sample(source, source.sample(record))


def encode_sample(source: Source, sample: Sample) -> SampleInputs:
    """Encode a sample with its images, as data workers do.

    Raises:
        BadSample: it is too long, or an image does not open.
    """
    processor = source.encoder.processor
    if not processor.needs_image_sizes:  # texts that are too long are refused before images are decoded
        encoded = source.encoder(sample)
        return model_inputs(processor, encoded, decode_sample_images(sample, processor), (), sample)
    images = decode_sample_images(sample, processor)
    sizes = media_sizes_from_opened(sample.media, images, processor)
    return model_inputs(processor, source.encoder(sample, sizes), images, sizes, sample)


def encode_blank_sample(source: Source, sample: Sample) -> SampleInputs:
    """Encode a sample with blank images of the sizes of its own.

    Raises:
        BadSample: it is too long, or the size of an image cannot be read.
    """
    processor = source.encoder.processor
    sizes = read_media_sizes(sample, processor)
    blanks = [make_blank_medium(processor, size) for size in sizes or [None] * len(sample.media)]
    return model_inputs(processor, source.encoder(sample, sizes), blanks, sizes, sample)


def model_inputs(
    processor: Processor,
    encoded: Encoded,
    media: Sequence[Medium],
    sizes: Sequence[MediaSize] = (),
    sample: Sample | None = None,
) -> SampleInputs:
    """Return the ids, labels and inputs of images and videos of a sample, as the collator takes them.

    `sample` is the one that they are of, for the message of an error.

    Raises:
        BadSample: the processor refuses an image or video.
    """

    def process_one(index: int) -> object:
        """Process one image or video alone, to find out which of them the processor refuses."""
        return processor.image_inputs(media[index : index + 1], sizes[index : index + 1])

    name, refs = ("?", []) if sample is None else (sample.id, sample.media)
    with processor_errors("the processor", name, refs, process_one):
        return join_inputs(processor, encoded, processor.image_inputs(media, sizes))


def join_inputs(processor: Processor, encoded: Encoded, image_inputs: Mapping[str, torch.Tensor]) -> SampleInputs:
    """Return the ids, labels, weights of losses and inputs of a sample, whose images' inputs are made or read."""
    text_inputs = processor.text_inputs(encoded.input_ids, encoded.labels, dict(image_inputs))
    weights = {} if encoded.weights is None else {LOSS_WEIGHTS: torch.tensor(encoded.weights)}
    return {"input_ids": encoded.input_ids, "labels": encoded.labels, **weights, **image_inputs, **text_inputs}


def load_dataset(
    config: DatasetConfig, encoder: SampleEncoder, *, seed: int = 0, first: int | None = None, evaluates: bool = False
) -> SampleDataset:
    """Read, check and count the records of a run's sources; the result is cached.

    Every record is parsed, its images are checked and its tokens counted.

    Args:
        config: the sources, and the policies for records that are bad or too long.
        encoder: the run's.
        seed: selects records where `max_samples` limits a source.
        first: the number of records to take from the beginning; defaults to all.
        evaluates: whether every sample has to stay usable, so that all images are decoded now.

    Raises:
        ValueError: a record cannot be used and the policy is `error`; or too many cannot; or none can.
    """
    return load_sources(make_sources(config, encoder), config, encoder, seed=seed, first=first, evaluates=evaluates)


def load_sources(
    sources: list[Source],
    config: DatasetConfig,
    encoder: SampleEncoder,
    *,
    seed: int,
    first: int | None = None,
    evaluates: bool = False,
) -> SampleDataset:
    """Read, check and count the records of existing sources; see `load_dataset`."""
    places, lengths, images, skipped, contributions = [], [], [], [], []
    labels, groups = [], []
    has_videos = has_thinking = False
    for number, source in enumerate(sources):
        records = draw_records(len(source), source.config.max_samples, seed)[:first]
        decode = None if evaluates else config.check_samples
        counts = count(source, records, decode, config.num_workers, partial(skip_or_raise, source, config))
        split = np.empty(0, np.int64)
        if config.over_length == "split":
            counts, split = add_parts(source, counts, config.num_workers)
        left_out = find_unusable(source, counts, config, split)
        check_skipped_share(source.shown_path, list(counts.problems.values()), len(records), config.max_skipped)
        kept = np.setdiff1d(np.arange(len(counts.record)), [*left_out, *split.tolist()])
        kept = repeat_by_weight(kept, source.weight, seed)
        if len(split):  # parts stand where their record stood
            kept = kept[np.argsort([source.record_of(record) for record in counts.record[kept]], kind="stable")]
        places.append(np.stack([np.full(len(kept), number), counts.record[kept]], axis=1))
        lengths.append(np.minimum(counts.length[kept], encoder.longest))
        images.append(counts.images[kept])
        has_videos |= bool(counts.videos[kept].any())
        has_thinking |= bool(counts.thinking[kept].any())
        if encoder.encodes_labels:
            new_labels, new_groups = counts.labels_and_groups_at(kept)
            labels += new_labels
            groups += new_groups
        skipped += left_out.values()
        contributions.append(Contribution(
            source.name, source.shown_path, source.records.fingerprint, len(source), len(kept), int(images[-1].sum()),
            int(lengths[-1].sum()), len(left_out), int((counts.length[kept] > encoder.longest).sum()),
        ))  # fmt: skip
    if not sum(map(len, places)):
        names = ", ".join(source.shown_path for source in sources)
        if not (total := sum(map(len, sources))):
            raise ValueError(f"{names}: it holds no records")
        reasons = group_reasons(skipped)
        raise ValueError(f"{names}: none of the {total} records can be used, mostly because: {reasons[0][0]}")
    rows = np.concatenate(places), np.concatenate(lengths), np.concatenate(images)
    dataset = SampleDataset(
        sources, *rows, has_videos=has_videos, has_thinking=has_thinking, labels=labels or None, groups=groups or None
    )
    dataset.skipped, dataset.contributions = skipped, contributions
    return dataset


def draw_records(number: int, max_samples: int | None, seed: int) -> np.ndarray:
    """Return the indices of `max_samples` of `number` records at random, in order; of all if there are no more."""
    if max_samples is None or max_samples >= number:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, max_samples, replace=False))


def repeat_by_weight(places: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Repeat each place `weight` times; the fraction of a weight is a share of the places, drawn at random."""
    repeated = np.repeat(places, int(weight))
    num_drawn = round((weight - int(weight)) * len(places))
    return np.sort(np.concatenate([repeated, np.random.default_rng(seed).choice(places, num_drawn, replace=False)]))
