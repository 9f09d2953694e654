"""Samples into batches: padding, a dummy image where a batch has none, and a list of the records left out."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlm.data.batching.stats import BATCH_STATS, compute_batch_stats
from vlm.data.dataset import Skipped
from vlm.data.encoding.labels import IGNORE_INDEX

SKIPPED_KEY: Final = "skipped"
"""The key of a batch under which the records stand that were left out of it; the training loop takes them out."""

TEXT_KEYS = ("input_ids", "labels")
"""What every sample has; its other keys are what the model reads of its images."""

IMAGE_INDEX: Final = "image_index"
"""The key of a batch that says, where equal images stand once, which row each image is."""

VIDEO_INPUT: Final = "pixel_values_videos"
"""The input of videos that are read by themselves: `(videos, frames, 3, height, width)`, or loose patches."""

DummyInputs = tuple[Sequence[int], Mapping[str, Tensor]]
"""Ids, and the model's inputs."""


class Collator:
    """Pads rows, and lays the images of all rows one after the other.

    Args:
        pad_token_id: id at padded places (their attention is 0, their label -100).
        dummy: ids of one image and the model's inputs for it, for a batch without images: every batch then runs the
            same modules, without which ranks would wait for each other, and a connector that trains alone would get
            no gradient. The placeholders are attended by nothing. None: no dummy.
        video_dummy: the same of one video, where pictures and videos are read by calls of their own and there are
            several ranks: a batch then has some of both. None: any of either will do.
        rows: inputs of images with one row for each sample; the others are laid one after the other.
        tokens: inputs with one value for each token.
        left: whether rows are padded on the left, as generation wants them.
        with_stats: whether batches have their `BatchStats` under `FACTS`, for the training loop to take out.
        deduplicate: inputs in which equal images stand once, see `ONCE`.
    """

    def __init__(
        self, pad_token_id: int, dummy: DummyInputs | None = None, *, video_dummy: DummyInputs | None = None,
        rows: Sequence[str] = (), tokens: Sequence[str] = (), left: bool = False, with_stats: bool = False,
        deduplicate: Sequence[str] = (),
    ):  # fmt: skip
        self.pad_token_id = pad_token_id
        self.dummy, self.video_dummy = dummy, video_dummy
        self.rows, self.tokens, self.left, self.facts = rows, tokens, left, with_stats
        self.deduplicate = deduplicate

    @classmethod
    def of(
        cls, processor: Any, dummy: DummyInputs | None = None, *, video_dummy: DummyInputs | None = None, left: bool = False,
        with_stats: bool = False, deduplicate: Sequence[str] = (),
    ) -> "Collator":  # fmt: skip
        """A collator for what a processor makes of images."""
        return cls(
            processor.tokenizer.pad_token_id, dummy, video_dummy=video_dummy, rows=processor.per_sample_inputs,
            tokens=processor.per_token_inputs, left=left, with_stats=with_stats, deduplicate=deduplicate,
        )  # fmt: skip

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Lay samples out as ids, mask and labels `(rows, tokens)`, and inputs such as `pixel_values` beside them.

        A record that was left out is no row, and no other stands in for it. Where none is left, one row without a
        supervised token keeps the ranks together.
        """
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        items: list[dict[str, Any]] = [dict(sample) for sample in samples if not isinstance(sample, Skipped)]
        real = [dict(item) for item in items] if self.facts else []
        items = items or [{"input_ids": [self.pad_token_id], "labels": [IGNORE_INDEX]}]
        for item in items:
            item["attention_mask"] = [1] * len(item["input_ids"])
        for dummy in self._missing_dummies({name for item in items for name in _image_input_names(item, self.tokens)}):
            shortest = min(items, key=lambda item: len(item["input_ids"]))
            _append_dummy(shortest, *dummy, self.tokens)
        longest = max(len(item["input_ids"]) for item in items)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        index = self._deduplicate(items)
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.stack([self._pad_row(item[name], longest, fill) for item in items]))
            for name, fill in fills.items()
        }
        names = dict.fromkeys(
            name for item in items for name in _image_input_names(item, self.tokens, include_token_inputs=True)
        )
        for name in names:
            batch[name] = self._collate_input(name, [item.get(name) for item in items], longest)
        if index is not None:
            batch[IMAGE_INDEX] = index
        if skipped:
            batch[SKIPPED_KEY] = skipped
        if self.facts:
            batch[BATCH_STATS] = compute_batch_stats(real, batch["input_ids"].numel())
        return batch

    def _missing_dummies(self, given: set[str]) -> list[DummyInputs]:
        """The dummies that a batch with these inputs needs."""
        if self.video_dummy is None:
            return [] if self.dummy is None or given else [self.dummy]
        both = [one for one in (self.dummy, self.video_dummy) if one is not None]
        return [(ids, inputs) for ids, inputs in both if given.isdisjoint(inputs)]

    def _deduplicate(self, items: Sequence[dict[str, Any]]) -> Tensor | None:
        """Leave of equal images the first one: which of those that stay each is, `(images,)`; None: none are equal."""
        given = {name for item in items for name in self.deduplicate if item.get(name) is not None}
        if not given:
            return None
        (name,) = given
        seen = [item for item in items if item.get(name) is not None]
        images = [image for item in seen for image in item[name]]
        first, index = deduplicate_images(images)
        if len(first) == len(images):
            return None
        waiting = iter(range(len(images)))
        for item in seen:
            kept = [place for place, number in enumerate(islice(waiting, len(item[name]))) if number in first]
            item[name] = item[name][kept] if kept else None
        return torch.tensor(index)

    def _pad_row(self, values: Any, longest: int, fill: int) -> np.ndarray:
        """Values for each token of a row, filled up to the longest."""
        array = np.asarray(values, dtype=np.int64)
        missing = longest - len(array)
        ends = (missing, 0) if self.left else (0, missing)
        return np.pad(array, [ends, *[(0, 0)] * (array.ndim - 1)], constant_values=fill)

    def _collate_input(self, name: str, values: list[Tensor | None], longest: int) -> Tensor:
        """One input of all rows."""
        given = [value for value in values if value is not None]
        if name == VIDEO_INPUT and len(numbers := {value.shape[1:-3] for value in given}) > 1:
            counts = sorted(number for (number,) in numbers)
            raise ValueError(f"this model takes videos of one number of frames in a batch, got {counts}")
        given = _pad_to_same_shape(given)
        if name in self.tokens:
            blank = given[0].new_zeros((longest, *given[0].shape[1:]))
            waiting = iter(given)
            return torch.stack(
                [blank if value is None else self._pad_tokens(next(waiting), longest) for value in values]
            )
        if name in self.rows:
            waiting = iter(given)
            blank = torch.zeros_like(given[0])
            given = [blank if value is None else next(waiting) for value in values]
        return _concatenate(given)

    def _pad_tokens(self, value: Tensor, longest: int) -> Tensor:
        filling = value.new_zeros((longest - len(value), *value.shape[1:]))
        return torch.cat([filling, value] if self.left else [value, filling])


def deduplicate_images(images: Sequence[Tensor]) -> tuple[dict[int, int], list[int]]:
    """Which images differ: the place where each stands first -> its number, and the number of every one."""
    first: dict[int, int] = {}
    alike: dict[tuple[Any, ...], list[int]] = {}
    index = []
    for place, image in enumerate(images):
        content: Any = image.contiguous().view(-1).view(torch.uint8).numpy()
        found = alike.setdefault((image.dtype, tuple(image.shape), crc32(content)), [])
        same = next((one for one in found if torch.equal(images[one], image)), None)
        if same is None:
            same = place
            found.append(place)
            first[place] = len(first)
        index.append(first[same])
    return first, index


def _image_input_names(
    item: Mapping[str, Any], tokens: Sequence[str], *, include_token_inputs: bool = False
) -> list[str]:
    """The inputs that an item has because of its images; with `every`, those for its tokens too."""
    left_out = (*TEXT_KEYS, "attention_mask", *(() if include_token_inputs else tokens))
    return [name for name, value in item.items() if name not in left_out and value is not None]


def _append_dummy(
    item: dict[str, Any], ids: Sequence[int], inputs: Mapping[str, Tensor], tokens: Sequence[str]
) -> None:
    """Put a dummy image behind an item: attended by nothing, and supervised nowhere."""
    own = len(item["input_ids"])
    item["input_ids"] = np.concatenate([np.asarray(item["input_ids"], dtype=np.int64), np.asarray(ids, dtype=np.int64)])
    item["labels"] = [*item["labels"], *[IGNORE_INDEX] * len(ids)]
    item["attention_mask"] = [*item["attention_mask"], *[0] * len(ids)]
    for name, value in inputs.items():
        if name in tokens:
            before = item.get(name)
            if before is None:
                before = value.new_zeros((own, *value.shape[1:]))
            item[name] = torch.cat(_pad_to_same_shape([before, value], first=1))
        else:
            item[name] = value


def _pad_to_same_shape(values: Sequence[Tensor], first: int = 1) -> list[Tensor]:
    """Tensors filled with zeros so that all their dimensions but the first are as long as the longest."""
    sizes = [max(value.shape[place] for value in values) for place in range(first, values[0].ndim)]
    if all(list(value.shape[first:]) == sizes for value in values):
        return list(values)
    filled = []
    for value in values:
        whole = value.new_zeros((*value.shape[:first], *sizes))
        whole[tuple(slice(length) for length in value.shape)] = value
        filled.append(whole)
    return filled


def _concatenate(values: Sequence[Tensor]) -> Tensor:
    """Inputs one after the other; in a data worker at once in the memory that it shares with its parent."""
    if get_worker_info() is None:
        return torch.cat(list(values))
    number = sum(map(len, values))
    shared = values[0].untyped_storage()._new_shared(values[0][0].nbytes * number)
    out = values[0].new(shared).view(number, *values[0].shape[1:])
    return torch.cat(list(values), out=out)
