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
from vlm.data.encoding.labels import IGNORED, Encoded
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, Clip, OverLong, Sample, Size
from vlm.data.sources import Source, sources_of
from vlm.data.token_counts import Counts, count
from vlm.data.vision.images import picture_sizes, seen_sizes, size_of
from vlm.data.vision.jpeg import decoded
from vlm.data.vision.video import OpenVideo

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
    def by(cls, error: BadSample, source: Source, record: int | None = None) -> "Skipped":
        """The record of a source that an error is about."""
        policy = "over_length" if isinstance(error, OverLong) else "on_bad_sample"
        return cls(record, error.sample_id, error.reason, error.file, source.path, policy)

    def refusal(self) -> ValueError:
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
        self._learnt = labels, groups

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
            return encoded_item(source, source.sample(record))
        except BadSample as error:
            return Skipped.by(error, source, record)

    def blank(self) -> Dataset[dict[str, Any]]:
        """The same samples with blank pictures."""
        return BlankPictures(self)

    def encoded(self, index: int, sizes: Sequence[Size] = ()) -> Encoded:
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
        return [None] * len(self) if self._learnt[0] is None else self._learnt[0]

    @property
    def groups(self) -> Sequence[str | None]:
        """In which group a ranking compares each sample; None for one that is in none."""
        return [None] * len(self) if self._learnt[1] is None else self._learnt[1]

    def subset(self, indices: "Sequence[int] | np.ndarray") -> "SampleDataset":
        """The samples at these places, as a dataset of its own."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self.places[chosen], self.lengths[chosen], self.num_images[chosen]
        labels, groups = (one and [one[index] for index in chosen.tolist()] for one in self._learnt)
        return SampleDataset(self.sources, *rows, has_videos=self.has_videos, labels=labels, groups=groups)


class BlankPictures(Dataset[dict[str, Any]]):
    """The same samples with every picture, and every frame of a video, of the processor's mean colour."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        processor = self.dataset.processor
        if not processor.needs_sizes:
            blanks = [blank_picture(processor)] * int(self.num_images[index])
            return model_inputs(processor, self.dataset.encoded(index), blanks)
        sizes = picture_sizes(self.dataset.sample(index), processor)
        blanks = [blank_of(processor, size) for size in sizes]
        return model_inputs(processor, self.dataset.encoded(index, sizes), blanks, sizes)


def encoded_item(source: Source, sample: Sample) -> dict[str, Any]:
    """A sample as a data worker hands it on.

    Raises:
        BadSample: it is too long, or a picture does not open.
    """
    processor = source.encoder.processor
    if not processor.needs_sizes:
        return model_inputs(processor, source.encoder(sample), decoded(sample, processor))
    pictures = decoded(sample, processor)
    sizes = seen_sizes(sample.media, pictures, processor)
    return model_inputs(processor, source.encoder(sample, sizes), pictures, sizes)


def model_inputs(
    processor: Any, encoded: Encoded, pictures: Sequence[Any], sizes: Sequence[Size] = ()
) -> dict[str, Any]:
    """Ids, labels, and what the model reads of pictures and videos, as the collator lays them out."""
    images = processor.image_inputs(pictures, sizes)
    tokens = processor.text_inputs(encoded.input_ids, encoded.labels, images)
    return {"input_ids": encoded.input_ids, "labels": encoded.labels, **images, **tokens}


def blank_picture(processor: Any, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of the image processor's mean colour, so high and so wide."""
    means = processor.image_processor.image_mean or [0.5]
    return Image.new("RGB", (size[1], size[0]), tuple(int(mean * 255) for mean in (*means, *means, *means)[:3]))


def blank_of(processor: Any, size: Size) -> Image.Image | OpenVideo:
    """A blank picture or video of this size."""
    if isinstance(size, Clip):
        return OpenVideo([blank_picture(processor, (size.height, size.width))] * len(size.frames), size)
    return blank_picture(processor) if size is None else blank_picture(processor, size)


def dummy_image(processor: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Ids of a blank image, and what a model reads of it; the few tokens of a video's frame will do."""
    blank = blank_picture(processor)
    sizes: list[Size] = [None if processor.pools_frames else size_of(blank)]
    ids, _ = processor.tokenize(processor.image_token, (), sizes)
    images = processor.image_inputs([blank], sizes)
    return ids, images | processor.text_inputs(ids, [IGNORED] * len(ids), images)


def dummy_video(processor: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The same of a short blank video."""
    clip = processor.shortest_clip
    ids, _ = processor.tokenize(processor.video_token, (), [clip])
    inputs = processor.image_inputs([blank_of(processor, clip)], [clip])
    return ids, inputs | processor.text_inputs(ids, [IGNORED] * len(ids), inputs)


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
    sources = sources_of(config, encoder)
    places, lengths, images, skipped, contributions = [], [], [], [], []
    labels, groups = [], []
    has_videos = False
    for number, source in enumerate(sources):
        records = drawn(len(source), source.config.max_samples, seed)[:first]
        decode = None if evaluates else config.check_samples
        counts = count(source, records, decode, config.num_workers, partial(_stop_where_asked, source, config))
        left_out = unusable(source, counts, config)
        need_few(source.path, list(counts.problems.values()), len(records), config.max_skipped)
        kept = np.setdiff1d(np.arange(len(records)), list(left_out))
        kept = repeated(kept, source.weight, seed)
        places.append(np.stack([np.full(len(kept), number), counts.record[kept]], axis=1))
        lengths.append(np.minimum(counts.length[kept], encoder.longest))
        images.append(counts.images[kept])
        has_videos |= bool(counts.videos[kept].any())
        if encoder.learns_labels:
            learnt = counts.learnt_at(kept)
            labels += learnt[0]
            groups += learnt[1]
        skipped += [left_out[place] for place in sorted(left_out)]
        contributions.append(Contribution(
            source.name, source.path, source.records.fingerprint, len(source), len(kept), int(images[-1].sum()),
            int(lengths[-1].sum()), len(left_out), int((counts.length[kept] > encoder.longest).sum()),
        ))  # fmt: skip
    if not sum(map(len, places)):
        names = ", ".join(source.path for source in sources)
        raise ValueError(f"{names}: none of {sum(map(len, sources))} records can be used; {_reasons(skipped)}")
    return SampleDataset(
        sources, np.concatenate(places), np.concatenate(lengths), np.concatenate(images),
        has_videos=has_videos, skipped=skipped, contributions=contributions, labels=labels or None,
        groups=groups or None,
    )  # fmt: skip


def _stop_where_asked(source: Source, config: DatasetConfig, record: int, problem: BadSample) -> None:
    """Raise ValueError at the first record that cannot be used, where such are not left out."""
    if config.on_bad_sample == "error":
        raise Skipped.by(problem, source, record).refusal()


def unusable(source: Source, counts: Counts, config: DatasetConfig) -> dict[int, Skipped]:
    """Which of the counted records are left out, and why: those with a problem, and those that are too long.

    Raises:
        ValueError: there is one, and the policy is `error`.
    """
    longest, truncate = source.encoder.longest, source.encoder.truncate
    too_long = counts.needed > longest if truncate else counts.length > longest
    errors = dict(counts.problems)
    for place in np.flatnonzero(too_long).tolist():
        length = int(counts.length[place])
        errors[place] = OverLong(counts.id_of(place), (
            f"{length} tokens: cutting it to {longest} would cut an image or every reply" if truncate else
            f"{length} tokens, at most {longest} are allowed (dataset.max_length, or the language model's positions)"
        ))  # fmt: skip
    found = {}
    for place, error in sorted(errors.items()):
        found[place] = Skipped.by(error, source, int(counts.record[place]))
        if getattr(config, found[place].policy) == "error":
            raise found[place].refusal()
    return found


def need_few(path: str, bad: Sequence[BadSample | Skipped], total: int, share: float) -> None:
    """Raise ValueError where more records cannot be used than `dataset.max_skipped` allows."""
    if len(bad) > share * total:
        reasons = Counter(one.reason for one in bad).most_common(3)
        listing = "; ".join(f"{reason} ({number})" if number > 1 else reason for reason, number in reasons)
        raise ValueError(
            f"{path}: {len(bad)} of {total} records cannot be used, more than dataset.max_skipped={share} allows. "
            f"Reasons: {listing}{' …' if len(bad) > sum(number for _, number in reasons) else ''}"
        )


def drawn(number: int, most: int | None, seed: int) -> np.ndarray:
    """Numbers of `most` of `number` records, in order; all where there are no more."""
    if most is None or most >= number:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, most, replace=False))


def repeated(places: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Each place `weight` times; of a broken number, the rest goes to as many as are drawn."""
    whole = np.repeat(places, int(weight))
    rest = round((weight - int(weight)) * len(places))
    return np.sort(np.concatenate([whole, np.random.default_rng(seed).choice(places, rest, replace=False)]))


def _reasons(skipped: list[Skipped]) -> str:
    commonest = Counter(one.reason for one in skipped).most_common(1)
    return f"the commonest reason is: {commonest[0][0]}" if commonest else "there are none"


def split_dataset(dataset: SampleDataset, share: float, seed: int) -> tuple[SampleDataset, SampleDataset]:
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
