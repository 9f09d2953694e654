"""Records as training samples: checked and counted once at the start, encoded when they are asked for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from vlm.config.schema import DatasetConfig
from vlm.data.encode import Encoded, encode, limit, open_picture
from vlm.data.formats import read_records, reader_of
from vlm.data.sample import BadSample, OverLong, Sample


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why.

    Attributes:
        record: its place in the file, from 0.
        id: its own name, if it has one.
        reason: why.
        file: the picture that it is about, if it is about one.
        source: the file of records.
    """

    record: int
    id: str
    reason: str
    file: str | None
    source: str


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes samples for one run.

    Attributes:
        processor: decides every token.
        longest: most tokens that a sample may have.
        truncate: whether a longer one loses its end, instead of being refused.
    """

    processor: Any
    longest: int
    truncate: bool

    def __call__(self, sample: Sample) -> Encoded:
        """Ids and labels of a sample.

        Raises:
            BadSample: it cannot be used, or is too long.
        """
        return self.shorten(encode(self.processor, sample), sample.id)

    def shorten(self, encoded: Encoded, sample_id: str) -> Encoded:
        """The sample within the limit; the very same object where it was."""
        return limit(encoded, self.longest, self.processor.image_token_id, sample_id, truncate=self.truncate)


class SampleDataset(Dataset[dict[str, Any]]):
    """Encoded samples, with their lengths known beforehand.

    Args:
        samples: the conversations.
        encode_sample: `Sample` -> ids and labels.
        processor: gives `pixel_values`.

    Attributes:
        lengths: tokens of each sample, image tokens counted.
        num_images: pictures of each sample.
        skipped: the records left out.
        num_truncated: samples whose last replies are cut to `dataset.max_length`.
    """

    def __init__(self, samples: list[Sample], lengths: list[int], encode_sample: Callable[[Sample], Encoded],
                 processor: Any, skipped: Iterable[Skipped] = (), num_truncated: int = 0):  # fmt: skip
        self.samples = samples
        self.lengths = lengths
        self.num_images = [len(sample.pictures) for sample in samples]
        self.encode_sample = encode_sample
        self.processor = processor
        self.skipped = list(skipped)
        self.num_truncated = num_truncated

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        encoded = self.encode_sample(sample)
        pictures = [open_picture(picture.path, sample.id) for picture in sample.pictures]
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "pixel_values": self.processor.pixel_values(pictures) if pictures else None,
        }

    def subset(self, indices: list[int]) -> "SampleDataset":
        """The samples at these places, as a dataset of its own."""
        chosen = [self.samples[i] for i in indices]
        return SampleDataset(chosen, [self.lengths[i] for i in indices], self.encode_sample, self.processor)


class BlankPictures(Dataset[dict[str, Any]]):
    """The same samples with every picture replaced by one of the processor's mean colour."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset
        self.lengths, self.num_images = dataset.lengths, dataset.num_images
        self.blank = blank_pixels(dataset.processor)  # (1, 3, height, width)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        encoded = self.dataset.encode_sample(self.dataset.samples[index])
        number = self.num_images[index]
        pixels = self.blank.expand(number, -1, -1, -1) if number else None
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "pixel_values": pixels}


def blank_pixels(processor: Any) -> torch.Tensor:
    """Pixels of a picture of the image processor's mean colour: `(1, 3, height, width)`."""
    colour = tuple(int(mean * 255) for mean in processor.image_processor.image_mean)
    return processor.pixel_values([Image.new("RGB", (64, 64), colour)])


def load_dataset(
    config: DatasetConfig, path: str, image_folder: str | None, processor: Any, longest: int, *,
    show_progress: bool = True, most: int | None = None,
) -> SampleDataset:  # fmt: skip
    """Read, check and count the records of one file.

    Every record is parsed, its pictures' headers opened and its tokens counted before anything trains.

    Args:
        config: policies for records that are bad or too long.
        path: the file of records.
        image_folder: what their image paths are relative to; None: the file's folder.
        processor: the checkpoint's processor.
        longest: most tokens that a sample may have.
        show_progress: whether to draw a progress bar.
        most: read the first so many records only.

    Raises:
        BadSample: a record that cannot be used, where the policy is `error`.
        ValueError: the file has no usable record.
    """
    source = Path(path)
    folder = Path(image_folder) if image_folder else source.parent
    read = reader_of(config.format)
    encoder = SampleEncoder(processor, longest, truncate=config.over_length == "truncate")
    samples: list[Sample] = []
    lengths: list[int] = []
    skipped: list[Skipped] = []
    num_truncated = 0
    records = read_records(source)[:most]
    for number, record in enumerate(tqdm(records, f"checking {source.name}", disable=not show_progress)):
        try:
            sample = read(record, folder)
            for picture in sample.pictures:
                check_picture(picture.path, sample.id)
            whole = encode(processor, sample)
            encoded = encoder.shorten(whole, sample.id)
        except BadSample as error:
            key = "over_length" if isinstance(error, OverLong) else "on_bad_sample"
            if getattr(config, key) == "error":
                raise ValueError(
                    f"{source}, record {number}: {error}. dataset.{key}=skip leaves such records out and lists them."
                ) from error
            skipped.append(Skipped(number, error.sample_id, error.reason, error.file, str(source)))
        else:
            samples.append(sample)
            lengths.append(len(encoded.input_ids))
            num_truncated += encoded is not whole
    if not samples:
        raise ValueError(f"{source}: none of its {len(records)} records can be used; {_reasons(skipped)}")
    return SampleDataset(samples, lengths, encoder, processor, skipped, num_truncated)


def check_picture(path: Path, sample_id: str) -> None:
    """Open a picture's header.

    Raises:
        BadSample: it is no picture.
    """
    try:
        Image.open(path).close()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(sample_id, f"image {path} does not open: {error}", str(path)) from error


def _reasons(skipped: list[Skipped]) -> str:
    return f"the first was left out because of: {skipped[0].reason}" if skipped else "the file is empty"


def split_dataset(dataset: SampleDataset, share: float, seed: int) -> tuple[SampleDataset, SampleDataset]:
    """Hold out a share, drawn with a seed: (rest, held out), at least one sample in each.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(dataset) < 2:
        raise ValueError(f"dataset.eval_split={share}: at least two records are needed, got {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(round(share * len(dataset)), 1), len(dataset) - 1)
    rest = dataset.subset(sorted(order[held:]))
    rest.skipped, rest.num_truncated = dataset.skipped, dataset.num_truncated
    return rest, dataset.subset(sorted(order[:held]))
