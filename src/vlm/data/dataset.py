"""Records as training samples: counted before anything trains, read and encoded when they are asked for."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vlm.config.schema import DatasetConfig
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, Clip, MediaSize, OverLong, Sample
from vlm.data.sources import Source, make_sources
from vlm.data.token_counts import Counts, count
from vlm.data.vision.images import media_sizes_from_opened, read_media_sizes, upright_size
from vlm.data.vision.jpeg import decode_sample_images
from vlm.data.vision.video import DecodedVideo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why.

    Attributes:
        record: its place in the source, from 0; None in a stream.
        id: its own name, if it has one.
        reason: why.
        file: the picture that it is about, if it is about one.
        source: the file of records.
        policy: the key of `dataset` that says what happens with such records.
    """

    record: int | None
    id: str
    reason: str
    file: str | None
    source: str
    policy: str = "on_bad_sample"

    @classmethod
    def from_error(cls, error: BadSample, source: Source, record: int | None = None) -> "Skipped":
        """The record of a source that an error is about."""
        policy = "over_length" if isinstance(error, OverLong) else "on_bad_sample"
        return cls(record, error.sample_id, error.reason, error.file, source.path, policy)

    def as_error(self) -> ValueError:
        """The error where such records are not left out."""
        place = self.source if self.record is None else f"{self.source}, record {self.record}"
        hint = f"dataset.{self.policy}=skip leaves such records out and lists them."
        if self.file is not None:
            hint = f"Pictures are looked for in dataset.image_folder. {hint}"
        return ValueError(f"{place}: record {self.id!r}: {self.reason}. {hint}")


@dataclass(frozen=True)
class Contribution:
    """What a source gives to a run.

    Attributes:
        source: its name.
        path: where its records are.
        fingerprint: of its content.
        records: how many it has.
        samples: how many of them an epoch takes, repetitions counted.
        images: their pictures.
        tokens: their tokens, image tokens counted.
        skipped: records left out.
        truncated: samples whose last replies are cut to `dataset.max_length`.
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


class SampleDataset(Dataset[Any]):
    """Encoded samples of one or several sources, with their lengths known beforehand.

    Args:
        sources: where the samples come from.
        places: `(samples, 2)`: the number of each sample's source, and of its record there.
        lengths: `(samples,)`: its tokens, image tokens counted.
        num_images: `(samples,)`: its pictures and videos.
        has_videos: whether the model sees videos in any of them.
        skipped: the records left out before.
        contributions: what each source gives.
        labels: what a prediction head learns of each sample, see `Sample.label`; None: of none.
        groups: in which group a ranking compares each; None: in none.
    """

    def __init__(
        self, sources: Sequence[Source], places: np.ndarray, lengths: np.ndarray, num_images: np.ndarray, *,
        has_videos: bool = False, skipped: Iterable[Skipped] = (), contributions: Iterable[Contribution] = (),
        labels: Sequence[Any] | None = None, groups: Sequence[str | None] | None = None,
    ):  # fmt: skip
        self.sources = list(sources)
        self.places = places
        self.lengths = lengths
        self.num_images = num_images
        self.has_videos = has_videos
        self.skipped = list(skipped)
        self.contributions = list(contributions)
        self._labels_and_groups = labels, groups

    def __len__(self) -> int:
        return len(self.places)

    def sample(self, index: int) -> Sample:
        """The conversation, as it was read.

        Raises:
            BadSample: its record cannot be used any more.
        """
        source, record = self.places[index].tolist()
        return self.sources[source].sample(record)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        """Ids, labels and pixels; `Skipped` for a record that turns out to be unusable, which a loop may not ignore."""
        number, record = self.places[index].tolist()
        source = self.sources[number]
        try:
            return encode_sample(source, source.sample(record))
        except BadSample as error:
            return Skipped.from_error(error, source, record)

    def blank(self) -> Dataset[dict[str, Any]]:
        """The same samples with blank pictures."""
        return BlankImageDataset(self)

    def encoded(self, index: int, sizes: Sequence[MediaSize] = ()) -> Encoded:
        """Ids and labels without the pictures; `sizes` where the processor needs them."""
        source, record = self.places[index].tolist()
        return self.sources[source].encoder(self.sources[source].sample(record), sizes)

    @property
    def processor(self) -> Any:
        """The run's processor."""
        return self.sources[0].encoder.processor

    @property
    def labels(self) -> Sequence[Any]:
        """What a prediction head learns of each sample; None of one that has no label."""
        return [None] * len(self) if self._labels_and_groups[0] is None else self._labels_and_groups[0]

    @property
    def groups(self) -> Sequence[str | None]:
        """In which group a ranking compares each sample; None for one that is in none."""
        return [None] * len(self) if self._labels_and_groups[1] is None else self._labels_and_groups[1]

    def subset(self, indices: "Sequence[int] | np.ndarray") -> "SampleDataset":
        """The samples at these places, as a dataset of its own."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self.places[chosen], self.lengths[chosen], self.num_images[chosen]
        labels, groups = (one and [one[index] for index in chosen.tolist()] for one in self._labels_and_groups)
        return SampleDataset(self.sources, *rows, has_videos=self.has_videos, labels=labels, groups=groups)


class BlankImageDataset(Dataset[dict[str, Any]]):
    """The same samples with every picture, and every frame of a video, of the processor's mean colour."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        processor = self.dataset.processor
        if not processor.needs_image_sizes:
            blanks = [make_blank_image(processor)] * int(self.num_images[index])
            return model_inputs(processor, self.dataset.encoded(index), blanks)
        sizes = read_media_sizes(self.dataset.sample(index), processor)
        blanks = [make_blank_medium(processor, size) for size in sizes]
        return model_inputs(processor, self.dataset.encoded(index, sizes), blanks, sizes)


def encode_sample(source: Source, sample: Sample) -> dict[str, Any]:
    """A sample as a data worker hands it on.

    Raises:
        BadSample: it is too long, or a picture does not open.
    """
    processor = source.encoder.processor
    if not processor.needs_image_sizes:
        return model_inputs(processor, source.encoder(sample), decode_sample_images(sample, processor))
    pictures = decode_sample_images(sample, processor)
    sizes = media_sizes_from_opened(sample.media, pictures, processor)
    return model_inputs(processor, source.encoder(sample, sizes), pictures, sizes)


def model_inputs(
    processor: Any, encoded: Encoded, pictures: Sequence[Any], sizes: Sequence[MediaSize] = ()
) -> dict[str, Any]:
    """Ids, labels, and what the model reads of pictures and videos, as the collator lays them out."""
    images = processor.image_inputs(pictures, sizes)
    tokens = processor.text_inputs(encoded.input_ids, encoded.labels, images)
    return {"input_ids": encoded.input_ids, "labels": encoded.labels, **images, **tokens}


def make_blank_image(processor: Any, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of the image processor's mean colour, so high and so wide."""
    means = processor.image_processor.image_mean or [0.5]
    return Image.new("RGB", (size[1], size[0]), tuple(int(mean * 255) for mean in (*means, *means, *means)[:3]))


def make_blank_medium(processor: Any, size: MediaSize) -> Image.Image | DecodedVideo:
    """A blank picture or video of this size."""
    if isinstance(size, Clip):
        return DecodedVideo([make_blank_image(processor, (size.height, size.width))] * len(size.frames), size)
    return make_blank_image(processor) if size is None else make_blank_image(processor, size)


def dummy_image(processor: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Ids of a blank image, and what a model reads of it; the few tokens of a video's frame will do."""
    blank = make_blank_image(processor)
    sizes: list[MediaSize] = [None if processor.pools_video_frames else upright_size(blank)]
    ids, _ = processor.tokenize(processor.image_token, (), sizes)
    images = processor.image_inputs([blank], sizes)
    return ids, images | processor.text_inputs(ids, [IGNORE_INDEX] * len(ids), images)


def dummy_video(processor: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The same of a short blank video."""
    assert processor.videos is not None
    clip = processor.videos.minimal_clip
    ids, _ = processor.tokenize(processor.video_token, (), [clip])
    inputs = processor.image_inputs([make_blank_medium(processor, clip)], [clip])
    return ids, inputs | processor.text_inputs(ids, [IGNORE_INDEX] * len(ids), inputs)


def load_dataset(
    config: DatasetConfig, encoder: SampleEncoder, *, seed: int = 0, first: int | None = None, evaluates: bool = False
) -> SampleDataset:
    """Read, check and count the records of a run's sources.

    Every record is parsed, its pictures looked at and its tokens counted before anything trains; what was found is
    kept in the cache.

    Args:
        config: the sources, and the policies for records that are bad or too long.
        encoder: the run's.
        seed: draws records where a source gives a part of them.
        first: take the first so many records only.
        evaluates: whether every sample has to be there to the end: all pictures are decoded now.

    Raises:
        ValueError: a record cannot be used and the policy is `error`; or too many cannot; or none can.
    """
    sources = make_sources(config, encoder)
    places, lengths, images, skipped, contributions = [], [], [], [], []
    labels, groups = [], []
    has_videos = False
    for number, source in enumerate(sources):
        records = draw_records(len(source), source.config.max_samples, seed)[:first]
        decode = None if evaluates else config.check_samples
        counts = count(source, records, decode, config.num_workers, partial(_raise_unless_skipped, source, config))
        left_out = find_unusable(source, counts, config)
        check_skipped_share(source.path, list(counts.problems.values()), len(records), config.max_skipped)
        kept = np.setdiff1d(np.arange(len(records)), list(left_out))
        kept = repeat_by_weight(kept, source.weight, seed)
        places.append(np.stack([np.full(len(kept), number), counts.record[kept]], axis=1))
        lengths.append(np.minimum(counts.length[kept], encoder.longest))
        images.append(counts.images[kept])
        has_videos |= bool(counts.videos[kept].any())
        if encoder.encodes_labels:
            learnt = counts.labels_and_groups_at(kept)
            labels += learnt[0]
            groups += learnt[1]
        skipped += [left_out[place] for place in sorted(left_out)]
        contributions.append(Contribution(
            source.name, source.path, source.records.fingerprint, len(source), len(kept), int(images[-1].sum()),
            int(lengths[-1].sum()), len(left_out), int((counts.length[kept] > encoder.longest).sum()),
        ))  # fmt: skip
    if not sum(map(len, places)):
        names = ", ".join(source.path for source in sources)
        raise ValueError(
            f"{names}: none of {sum(map(len, sources))} records can be used; {_most_common_reason(skipped)}"
        )
    return SampleDataset(
        sources, np.concatenate(places), np.concatenate(lengths), np.concatenate(images),
        has_videos=has_videos, skipped=skipped, contributions=contributions, labels=labels or None,
        groups=groups or None,
    )  # fmt: skip


def _raise_unless_skipped(source: Source, config: DatasetConfig, record: int, problem: BadSample) -> None:
    """Raise ValueError at the first record that cannot be used, where such are not left out."""
    if config.on_bad_sample == "error":
        raise Skipped.from_error(problem, source, record).as_error()


def find_unusable(source: Source, counts: Counts, config: DatasetConfig) -> dict[int, Skipped]:
    """Which of the counted records are left out, and why: those with a problem, and those that are too long.

    Raises:
        ValueError: there is one, and the policy is `error`.
    """
    longest, truncate = source.encoder.longest, source.encoder.truncate
    too_long = counts.needed > longest if truncate else counts.length > longest
    errors = dict(counts.problems)
    for place in np.flatnonzero(too_long).tolist():
        length = int(counts.length[place])
        errors[place] = OverLong(counts.record_id(place), (
            f"{length} tokens: cutting it to {longest} would cut an image or every reply" if truncate else
            f"{length} tokens, at most {longest} are allowed (dataset.max_length, or the language model's positions)"
        ))  # fmt: skip
    found = {}
    for place, error in sorted(errors.items()):
        found[place] = Skipped.from_error(error, source, int(counts.record[place]))
        if getattr(config, found[place].policy) == "error":
            raise found[place].as_error()
    return found


def check_skipped_share(path: str, bad: Sequence[BadSample | Skipped], total: int, share: float) -> None:
    """Raise ValueError where more records cannot be used than `dataset.max_skipped` allows."""
    if len(bad) > share * total:
        reasons = Counter(one.reason for one in bad).most_common(3)
        listing = "; ".join(f"{reason} ({number})" if number > 1 else reason for reason, number in reasons)
        raise ValueError(
            f"{path}: {len(bad)} of {total} records cannot be used, more than dataset.max_skipped={share} allows. "
            f"Reasons: {listing}{' …' if len(bad) > sum(number for _, number in reasons) else ''}"
        )


def draw_records(number: int, most: int | None, seed: int) -> np.ndarray:
    """Numbers of `most` of `number` records, in order; all where there are no more."""
    if most is None or most >= number:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, most, replace=False))


def repeat_by_weight(places: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Each place `weight` times; of a broken number, the rest goes to as many as are drawn."""
    whole = np.repeat(places, int(weight))
    rest = round((weight - int(weight)) * len(places))
    return np.sort(np.concatenate([whole, np.random.default_rng(seed).choice(places, rest, replace=False)]))


def _most_common_reason(skipped: list[Skipped]) -> str:
    commonest = Counter(one.reason for one in skipped).most_common(1)
    return f"the commonest reason is: {commonest[0][0]}" if commonest else "there are none"


def split_off_eval(dataset: SampleDataset, share: float, seed: int) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share of the records, drawn with a seed: (rest, held out), at least one in each.

    A record that is taken several times is on one side only.

    Raises:
        ValueError: there are fewer than two records.
    """
    distinct, first, which = np.unique(dataset.places, axis=0, return_index=True, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError(f"dataset.eval_split={share}: at least two records are needed, got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).numpy()
    held = order[: min(max(round(share * len(distinct)), 1), len(distinct) - 1)]
    rest = dataset.subset(np.flatnonzero(~np.isin(which.ravel(), held)))
    rest.skipped, rest.contributions = dataset.skipped, dataset.contributions
    return rest, dataset.subset(np.sort(first[held]))
