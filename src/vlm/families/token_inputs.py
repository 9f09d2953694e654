"""Inputs of a family's model with one value for each token, made from ids that were laid out here.

A family's own processor makes them beside its ids. Each maker below does so for some families; which one a processor
needs is found by comparing it with the processor's own call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from vlm.data.encoding.labels import IGNORE_INDEX

Maker = Callable[[Sequence[int], Sequence[int], Mapping[str, Tensor]], Tensor]
"""Makes an input `(tokens, …)` from ids, labels and the inputs of the images."""

MASK_OF_IMAGES = "cross_attention_mask"
"""The input that says which token attends to which tile of which image; a sample without images has none."""


@dataclass(frozen=True)
class TokenTypes:
    """Makes types of tokens: 0 text, 1 image, 2 video, 3 audio."""

    native: ProcessorMixin

    def __call__(self, ids: Sequence[int], labels: Sequence[int], images: Mapping[str, Tensor]) -> Tensor:
        """Return the type of each token: `(tokens,)`."""
        return torch.tensor(self.native.create_mm_token_type_ids([list(ids)])[0])


@dataclass(frozen=True)
class ImageMarks:
    """Makes marks: 1 at the ids where features of images are placed, else 0."""

    image_id: int

    def __call__(self, ids: Sequence[int], labels: Sequence[int], images: Mapping[str, Tensor]) -> Tensor:
        """Return the mark of each token: `(tokens,)`."""
        return (torch.tensor(list(ids)) == self.image_id).long()


@dataclass(frozen=True)
class CrossAttentionMask:
    """Makes Llama 3.2 Vision's mask."""

    image_id: int
    max_tiles: int

    def __call__(self, ids: Sequence[int], labels: Sequence[int], images: Mapping[str, Tensor]) -> Tensor:
        """Return which token attends to which tile of which image: `(tokens, images, tiles)`."""
        tiles = images["aspect_ratio_mask"].sum(-1).tolist()  # (1, images)
        places = [get_cross_attention_token_mask(list(ids), self.image_id)]
        return torch.from_numpy(convert_sparse_cross_attention_mask_to_dense(places, tiles, self.max_tiles, len(ids)))[
            0
        ]


def mark_replies(ids: Sequence[int], labels: Sequence[int], images: Mapping[str, Tensor]) -> Tensor:
    """Return 1 from the first supervised token on, where PaliGemma's attention is causal, else 0: `(tokens,)`."""
    first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    return torch.tensor([0] * first + [1] * (len(ids) - first))


def find_maker(
    native: ProcessorMixin, name: str, expected: Tensor, ids: Sequence[int], images: Mapping[str, Tensor], image_id: int
) -> Maker | None:
    """Return the maker of an input that agrees with a processor's own values `(tokens, …)`; None: there is none.

    Args:
        native: the processor.
        name: the input's name.
        expected: its values beside `ids`, in the processor's own call.
        ids: those of a text with images.
        images: the inputs of these images.
        image_id: the id where features of images are placed.
    """
    if name == MASK_OF_IMAGES:
        if "aspect_ratio_mask" not in images or not hasattr(native.image_processor, "max_image_tiles"):
            return None
        candidates: list[Maker] = [CrossAttentionMask(image_id, native.image_processor.max_image_tiles)]
    else:
        candidates = [TokenTypes(native), ImageMarks(image_id)]
    for make in candidates:
        made = make(ids, (), images)
        if made.shape == expected.shape and torch.equal(made.to(expected.dtype), expected):
            return make
    return None
