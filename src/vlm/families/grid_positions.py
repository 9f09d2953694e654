"""Models whose tokens of images and videos have positions in time, height and width (M-RoPE)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TYPES_INPUT = "mm_token_type_ids"
IMAGE_TYPE = 1
"""The type of a token of an image."""
NUM_AXES = 3
"""Positions of a token, where its configuration does not divide the rotary dimensions among another number."""


def has_grid_positions(model: nn.Module) -> bool:
    """Return whether a model's own code computes positions in time, height and width from ids and types of tokens.

    Qwen-VL's and those after it have `get_rope_index` for that, in the model beneath the vocabulary head.
    """
    compute = getattr(getattr(model, "model", None), "get_rope_index", None)
    return compute is not None and TYPES_INPUT in inspect.signature(compute).parameters


def count_axes(model: PreTrainedModel) -> int:
    """Return how many positions a token has in a model with grid positions."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or ()) or NUM_AXES


def compute_by_row(model: nn.Module) -> None:
    """Let a model that reads images alone compute grid positions row by row, in place; others stay as they are.

    HunyuanOCR counts images over a whole batch, so that a row's positions depend on the rows before it, and refuses
    an image that nothing attends to, such as the one that completes a batch of texts.
    """
    if not has_grid_positions(model):
        return
    body = cast(PositionedModel, model.model)
    known = inspect.signature(body.get_rope_index).parameters
    reads_images_alone = "image_grid_thw" in known and "video_grid_thw" not in known
    if reads_images_alone and not isinstance(body.get_rope_index, RowPositions):
        body.get_rope_index = RowPositions(body.get_rope_index)


class PositionedModel(Protocol):
    """The model beneath the vocabulary head, as far as its positions go."""

    get_rope_index: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowPositions:
    """Computes positions by a model's own code, each row by itself and without images that nothing attends to.

    Attributes:
        compute: the model's `get_rope_index`.
    """

    compute: Callable[..., tuple[Tensor, Tensor]]

    def __call__(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Return positions `(axes, rows, tokens)` and, for each row, what is added to those behind it: `(rows, 1)`.

        Args:
            input_ids: `(rows, tokens)`.
            mm_token_type_ids: 1 at images: `(rows, tokens)`.
            image_grid_thw: patches of each image in time, height and width: `(images, 3)`.
            attention_mask: 0 at padding and at an image that completes a batch: `(rows, tokens)`.
            kwargs: passed on.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions, deltas, first = [], [], 0
        for row in range(len(input_ids)):
            grids = None
            if image_grid_thw is not None:
                seen = _find_images(mm_token_type_ids[row], mask[row])
                end = first + len(seen) if row < len(input_ids) - 1 else None  # one too many is the model's to refuse
                own = image_grid_thw[first:end]
                kept = [index for index in range(len(own)) if index >= len(seen) or seen[index]]
                grids, first = own[kept] if kept or any(seen) else None, first + len(seen)
            one = slice(row, row + 1)
            found = self.compute(
                input_ids[one],
                mm_token_type_ids=mm_token_type_ids[one],
                image_grid_thw=grids,
                attention_mask=None if attention_mask is None else attention_mask[one],
                **kwargs,
            )
            positions.append(found[0])
            deltas.append(found[1])
        return torch.cat(positions, dim=1), torch.cat(deltas)


def _find_images(types: Tensor, mask: Tensor) -> list[bool]:
    """Return, for each image of a row, whether anything attends to it, by types and mask `(tokens,)`."""
    tokens = zip(types.tolist(), mask.tolist(), strict=True)
    groups = groupby(tokens, key=lambda token: token[0] == IMAGE_TYPE)
    return [any(attended for _, attended in group) for is_image, group in groups if is_image]
