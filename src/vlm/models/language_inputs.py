"""What a language model reads beside embeddings: inputs that it looks up by ids, and positions in grids of images.

Hub code: imports torch only.

Shapes: B rows, T tokens a row, I images in the batch.
"""

import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .native import Grid

PER_LAYER = "per_layer_inputs"
"""The argument of decoders that look tokens up again in each layer (Gemma 3n, Gemma 4)."""


def looks_up_ids(decoder: nn.Module | type) -> bool:
    """Return whether a decoder takes what it looks up by ids from outside, and looks it up itself on request."""
    kind = decoder if isinstance(decoder, type) else type(decoder)
    forward = cast(nn.Module, kind).forward
    return hasattr(kind, f"get_{PER_LAYER}") and PER_LAYER in inspect.signature(forward).parameters


def look_up_ids(decoder: nn.Module, input_ids: Tensor, image_token_id: int, pad_token_id: int | None) -> Tensor:
    """Return the inputs of each layer that a decoder looks up by ids: `(B, T) -> (B, T, layers, width)`.

    Placeholders of images are looked up as padding, as Gemma's own vision-language models do it.
    """
    ids = input_ids.masked_fill(input_ids == image_token_id, pad_token_id or 0)
    look_up = getattr(decoder, f"get_{PER_LAYER}")
    return look_up(ids)


def grid_positions(
    input_ids: Tensor,
    grids: Sequence[Grid],
    image_token_id: int,
    mask: Tensor | None = None,
    text_positions: Tensor | None = None,
) -> Tensor:
    """Return positions of tokens in text, time, rows and columns, as Qwen2-VL has them: `(B, T) -> (4, B, T)`.

    A text token stands one behind the token before it in all of them. The tokens of an image stand at one time, in
    their rows and columns from there on; the text goes on behind the longer side (Wang et al. 2024, arXiv:2409.12191,
    section 2.1). The first of the four counts tokens, and tells samples of a packed row apart.

    Args:
        input_ids: with placeholders for the tokens of each image.
        grids: rows and columns of tokens of each image of the batch, in order.
        image_token_id: the id of placeholders.
        mask: `(B, T)`, 0 at padding.
        text_positions: `(B, T)`, which begin anew with each sample of a packed row, at 0 or behind a prompt that it
            shares with the sample before it; None: counted from `mask`.
    """
    is_image = input_ids == image_token_id
    is_token = torch.ones_like(is_image) if mask is None else mask.bool()
    if text_positions is None:
        text_positions = (is_token.cumsum(1) - 1).clamp(min=0)
    places, steps = _image_places(grids, input_ids.device)  # (3, placeholders), (placeholders,)
    within = input_ids.new_zeros(3, *input_ids.shape)
    within[:, is_image] = places
    advance = is_token.long()
    advance[is_image] = steps
    advance = advance * is_token
    before = advance.cumsum(1) - advance
    text_positions = text_positions.expand(input_ids.shape)
    positions = (before - _count_before_samples(before, text_positions) + within) * is_token
    return torch.cat([text_positions[None], positions])


def _count_before_samples(before: Tensor, text_positions: Tensor) -> Tensor:
    """Return of what stands before each token what is no part of its sample: `(B, T), (B, T) -> (B, T)`.

    A sample that shares a prompt goes on where the prompt ends, in the sample before it.
    """
    index = torch.arange(before.shape[1], device=before.device).expand(before.shape)
    is_restart = text_positions.diff(dim=1, prepend=text_positions[:, :1] - 1) != 1
    starts = torch.where(is_restart, index, 0).cummax(1).values
    with_prompt = torch.where(text_positions == 0, index, 0).cummax(1).values  # where the sample with the prompt starts
    shared = text_positions.gather(1, starts) - text_positions.gather(1, with_prompt)
    prompt = before.gather(1, with_prompt + shared) - before.gather(1, with_prompt)
    return before.gather(1, starts) - prompt


def _image_places(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return time, row and column of each token of images, and how far the text goes on behind it."""
    places, steps = [], []
    for rows, columns in grids:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1))
        behind = torch.zeros(rows * columns, dtype=torch.long)
        behind[-1] = max(rows, columns)
        steps.append(behind)
    if not places:
        return torch.zeros(3, 0, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat(places, dim=1).to(device), torch.cat(steps).to(device)
