"""From samples to batches: padding, a dummy image where a batch has none, and a list of the records left out."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Final, cast
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import get_worker_info

from vlm.data.batching.batch import Batch
from vlm.data.batching.row_indices import shift_indices
from vlm.data.batching.stats import BATCH_STATS, compute_batch_stats
from vlm.data.dataset import LOSS_WEIGHTS, SAMPLE_REF
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor, RowIndex, SampleInputs
from vlm.data.skipped import Skipped

SKIPPED_KEY: Final = "skipped"
"""The key of the records that were left out of a batch; the training loop takes them out."""

SAMPLE_REFS: Final = "sample_refs"
"""The key of the `SampleRef`s of a batch; the training loop takes them out."""

TEXT_KEYS = ("input_ids", "labels")
"""The keys of every sample; its other keys are inputs of its images."""

IMAGE_INDEX: Final = "image_index"
"""The key of a batch that says, where equal images stand once, which row each image is."""

VIDEO_INPUT: Final = "pixel_values_videos"
"""The input of videos that are encoded separately: `(videos, frames, 3, height, width)`, or flattened patches."""

DummyInputs = tuple[Sequence[int], Mapping[str, Tensor]]
"""The ids and the model's inputs of one image or video."""


@dataclass(eq=False, repr=False)
class Collator:
    """Pads rows, and concatenates the images of all rows.

    Attributes:
        pad_token_id: id at padded positions (their attention is 0, their label -100).
        dummy: an image for a batch without images. Every batch then runs the same modules; otherwise ranks would
            wait for each other, and a connector that trains alone would get no gradient. Nothing attends to its
            placeholders. None for no dummy.
        video_dummy: a video, where images and videos are encoded separately and there are several ranks: every batch
            then has both. None if an image or a video will do.
        rows: image inputs with one row for each sample; the others are concatenated.
        tokens: inputs with one value for each token, besides the weights of losses.
        dims: image input -> the dimension along which it is concatenated, where that is not the first one.
        indices: image input -> the input whose rows its numbers are indices of.
        left: whether rows are padded on the left, as generation needs them.
        with_stats: whether batches have `BatchStats` under `BATCH_STATS`, for the training loop to take out.
        with_refs: whether they say under `SAMPLE_REFS` which samples they hold, for the training loop to take out.
        deduplicate: inputs in which equal images are there once, see `Processor.deduplicated_inputs`.
    """

    pad_token_id: int
    dummy: DummyInputs | None = None
    _: KW_ONLY
    video_dummy: DummyInputs | None = None
    rows: Sequence[str] = ()
    tokens: Sequence[str] = ()
    dims: Mapping[str, int] = field(default_factory=dict)
    indices: Mapping[str, RowIndex] = field(default_factory=dict)
    left: bool = False
    with_stats: bool = False
    with_refs: bool = False
    deduplicate: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        processor: Processor,
        dummy: DummyInputs | None = None,
        *,
        video_dummy: DummyInputs | None = None,
        left: bool = False,
        with_stats: bool = False,
        with_refs: bool = False,
        deduplicate: Sequence[str] = (),
    ) -> "Collator":
        """Make a collator for the inputs of a processor."""
        return cls(
            cast(int, processor.tokenizer.pad_token_id),
            dummy,
            video_dummy=video_dummy,
            rows=processor.per_sample_inputs,
            tokens=processor.per_token_inputs,
            dims=processor.concatenation_dims,
            indices=processor.row_indices,
            left=left,
            with_stats=with_stats,
            with_refs=with_refs,
            deduplicate=deduplicate,
        )

    def __call__(self, samples: Sequence[SampleInputs | Skipped]) -> Batch:
        """Collate samples into ids, mask and labels `(rows, tokens)`, and inputs such as `pixel_values`.

        A record that was left out has no row, and no other replaces it. Where no sample remains, one row without a
        supervised token keeps the ranks together.
        """
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        items: list[SampleInputs] = [dict(sample) for sample in samples if not isinstance(sample, Skipped)]
        refs = [item.pop(SAMPLE_REF) for item in items if SAMPLE_REF in item]
        originals = [dict(item) for item in items] if self.with_stats else []
        items = items or [{"input_ids": [self.pad_token_id], "labels": [IGNORE_INDEX]}]
        for item in items:
            item["attention_mask"] = [1] * len(item["input_ids"])
        weights = [item.pop(LOSS_WEIGHTS, None) for item in items]
        for dummy in self._missing_dummies(_input_names(items) - {*self.tokens}):
            shortest = min(items, key=lambda item: len(item["input_ids"]))
            _append_dummy(shortest, *dummy, self.tokens)
        longest = max(len(item["input_ids"]) for item in items)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        shift_indices(items, self.indices)
        index = self._deduplicate(items)
        batch: dict[str, object] = {}
        for name, fill in fills.items():
            rows = [torch.as_tensor(item[name], dtype=torch.int64) for item in items]
            batch[name] = torch.stack([self._pad(row, longest, fill) for row in rows])
        for name in _input_names(items):
            batch[name] = self._collate_input(name, [item.get(name) for item in items], longest)
        if any(weight is not None for weight in weights):
            batch[LOSS_WEIGHTS] = self._collate_weights(weights, items, longest)
        if index is not None:
            batch[IMAGE_INDEX] = index
        if skipped:
            batch[SKIPPED_KEY] = skipped
        if self.with_refs:
            batch[SAMPLE_REFS] = refs
        if self.with_stats:
            batch[BATCH_STATS] = compute_batch_stats(originals, len(items) * longest)
        return cast(Batch, batch)

    def _missing_dummies(self, names: Set[str]) -> list[DummyInputs]:
        """Return the dummies that a batch with these inputs needs."""
        if self.video_dummy is None:
            return [] if self.dummy is None or names else [self.dummy]
        dummies = [dummy for dummy in (self.dummy, self.video_dummy) if dummy is not None]
        return [(ids, inputs) for ids, inputs in dummies if names.isdisjoint(inputs)]

    def _deduplicate(self, items: Sequence[SampleInputs]) -> Tensor | None:
        """Keep the first of equal images; return, for each image, its index among those kept: `(images,)`.

        None if all images differ.
        """
        names = {name for item in items for name in self.deduplicate if item.get(name) is not None}
        if not names:
            return None
        (name,) = names
        with_images = [item for item in items if item.get(name) is not None]
        images = [image for item in with_images for image in item[name]]
        index_by_first, index = deduplicate_images(images)
        if len(index_by_first) == len(images):
            return None
        numbers = iter(range(len(images)))
        for item in with_images:
            kept = [i for i, number in enumerate(islice(numbers, len(item[name]))) if number in index_by_first]
            item[name] = item[name][kept] if kept else None
        return torch.tensor(index)

    def _pad(self, value: Tensor, longest: int, fill: int = 0) -> Tensor:
        """Pad the values of one row: `(tokens, …) -> (longest, …)`."""
        missing = longest - len(value)
        ends = (missing, 0) if self.left else (0, missing)
        return pad(value, (*[0, 0] * (value.ndim - 1), *ends), value=fill)

    def _collate_weights(self, weights: Sequence[Tensor | None], items: Sequence[SampleInputs], longest: int) -> Tensor:
        """Return the weights of the losses of all rows, 1 if a sample has none: `(rows, tokens)`."""
        rows = []
        for weight, item in zip(weights, items, strict=True):
            ones = torch.ones(len(item["input_ids"]) - (0 if weight is None else len(weight)))  # those of a dummy
            rows.append(self._pad(ones if weight is None else torch.cat([weight, ones]), longest, 1))
        return torch.stack(rows)

    def _collate_input(self, name: str, values: list[Tensor | None], longest: int) -> Tensor:
        """Collate one input of all rows; None for rows without it."""
        present = [value for value in values if value is not None]
        if name == VIDEO_INPUT and len(numbers := {value.shape[1:-3] for value in present}) > 1:
            counts = sorted(number for (number,) in numbers)
            raise ValueError(f"this model takes videos of one number of frames in a batch, got {counts}")
        if name in self.dims:
            return torch.cat(present, dim=self.dims[name])
        present = _pad_to_same_shape(present)
        padded = iter(present)
        if name in self.rows or name in self.tokens:
            blank = torch.zeros_like(present[0])
            present = [blank if value is None else next(padded) for value in values]
        if name in self.tokens:
            return torch.stack([self._pad(value, longest) for value in present])
        return _concatenate(present)


def deduplicate_images(images: Sequence[Tensor]) -> tuple[dict[int, int], list[int]]:
    """Find equal images.

    Returns:
        For each image that differs from those before it, its place in `images` and its index among such images; and
        for every image, the index of its equal.
    """
    index_by_first: dict[int, int] = {}
    candidates: dict[tuple[torch.dtype, torch.Size, int], list[int]] = {}
    indices = []
    for place, image in enumerate(images):
        content = image.contiguous().view(-1).view(torch.uint8).numpy().data
        similar = candidates.setdefault((image.dtype, image.shape, crc32(content)), [])
        first = next((other for other in similar if torch.equal(images[other], image)), None)
        if first is None:
            first = place
            similar.append(place)
            index_by_first[place] = len(index_by_first)
        indices.append(index_by_first[first])
    return index_by_first, indices


def _input_names(items: Sequence[SampleInputs]) -> Set[str]:
    """Return the names of inputs that any item has besides ids, labels and mask, in order."""
    names = [name for item in items for name, value in item.items() if value is not None]
    return dict.fromkeys(name for name in names if name not in (*TEXT_KEYS, "attention_mask")).keys()


def _append_dummy(item: SampleInputs, ids: Sequence[int], inputs: Mapping[str, Tensor], tokens: Sequence[str]) -> None:
    """Append a dummy image to an item: nothing attends to it, and nothing is supervised."""
    length = len(item["input_ids"])
    item["input_ids"] = [*item["input_ids"], *ids]
    item["labels"] = [*item["labels"], *[IGNORE_INDEX] * len(ids)]
    item["attention_mask"] = [*item["attention_mask"], *[0] * len(ids)]
    for name, value in inputs.items():
        if name in tokens:
            before = item.get(name)
            if before is None:
                before = value.new_zeros((length, *value.shape[1:]))
            value = torch.cat(_pad_to_same_shape([before, value]))
        item[name] = value


def _pad_to_same_shape(values: Sequence[Tensor]) -> list[Tensor]:
    """Pad all dimensions after the first one with zeros to the largest size."""
    shapes = [value.shape[1:] for value in values]
    if len(set(shapes)) == 1:
        return list(values)
    largest = np.max(shapes, axis=0)
    padded = []
    for value, shape in zip(values, shapes, strict=True):
        ends: list[int] = []
        for missing in reversed((largest - shape).tolist()):  # `pad` takes the last dimension first
            ends += [0, missing]
        padded.append(pad(value, ends))
    return padded


def _concatenate(values: Sequence[Tensor]) -> Tensor:
    """Concatenate inputs; in a data worker directly in memory that is shared with its parent."""
    if get_worker_info() is None:
        return torch.cat(list(values))
    number = sum(map(len, values))
    shared = values[0].untyped_storage()._new_shared(values[0][0].nbytes * number)
    out = values[0].new(shared).view(number, *values[0].shape[1:])
    return torch.cat(list(values), out=out)
