"""Visual encoders at native resolution: the features of images of different sizes, in one call where it can be.

Three kinds of encoders, told apart by the arguments of their `forward`:

- `spatial_shapes` (SigLIP 2 with NaFlex): patches of each image, padded to the largest, with a mask;
- `grid_thw` (Qwen2.5-VL's and its successors' vision towers): the patches of all images in one row, of which each image
  attends to itself. Their merger, a connector for another language model, is taken off; its norm stays;
- `pixel_values` alone (DINOv2, DINOv3, CLIP, SigLIP): images of one size in a call, with positions that are
  interpolated or rotated.

Hub code: imports torch, transformers and its siblings only.

Shapes: I images, N patches of all of them row by row and image by image, V width of the features.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .encoders import read_states
from .native import Grid, join_patches, square_order

NORM_NAMES = ("ln_q", "norm")
"""Names of the norm of a merger, which belongs to the encoder's output."""


class MergerNorm(nn.Module):
    """What stays of a merger: its norm, and the patches of a square side by side.

    `(N, V) -> (N / side**2, side**2 * V)`. Its parameters have their names in the merger.
    """

    def __init__(self, merger: nn.Module, square: int):
        super().__init__()
        self.square = square
        self.norm_name = next(name for name in NORM_NAMES if isinstance(getattr(merger, name, None), nn.Module))
        self.add_module(self.norm_name, getattr(merger, self.norm_name))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise, see the class."""
        return getattr(self, self.norm_name)(states).reshape(states.shape[0] // self.square, -1)


def forward_arguments(encoder: nn.Module | type) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of an encoder's `forward`."""
    kind = encoder if isinstance(encoder, type) else type(encoder)
    return inspect.signature(kind.forward).parameters


def remove_merger(encoder: nn.Module) -> None:
    """Take the merger off an encoder that has one, see `MergerNorm`; other encoders stay as they are."""
    merger = getattr(encoder, "merger", None)
    if "grid_thw" in forward_arguments(encoder) and not isinstance(merger, MergerNorm):
        config = cast(PreTrainedModel, encoder).config
        encoder.merger = MergerNorm(cast(nn.Module, merger), config.spatial_merge_size**2)


def read_native_features(
    encoder: nn.Module,
    patches: Tensor,
    grids: Sequence[Grid],
    feature_layer: int | list[int] | None,
    num_prefix_tokens: int,
) -> Tensor:
    """Return the features of the patches of images: `(N, 3, side, side) -> (N, V)`.

    Args:
        encoder: a visual encoder of one of the three kinds.
        patches: normalised pixels, of all images.
        grids: rows and columns of patches of each image.
        feature_layer: see `VLMConfig`.
        num_prefix_tokens: number of tokens before the patches, which are left out.
    """
    arguments = forward_arguments(encoder)
    if "spatial_shapes" in arguments:
        return _read_padded(encoder, patches, grids, feature_layer)
    if "grid_thw" in arguments:
        return _read_merged(encoder, patches, grids)
    keywords = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in arguments else {}
    sizes = [rows * columns for rows, columns in grids]
    images = patches.split(sizes)
    features: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        places = [place for place, other in enumerate(grids) if other == grid]
        pixels = join_patches(torch.cat([images[place] for place in places]), grid)
        states = read_states(encoder, {"pixel_values": pixels, **keywords}, feature_layer)[:, num_prefix_tokens:]
        features |= dict(zip(places, states, strict=True))
    return torch.cat([features[place] for place in range(len(grids))])


def _read_padded(
    encoder: nn.Module, patches: Tensor, grids: Sequence[Grid], feature_layer: int | list[int] | None
) -> Tensor:
    """Return the features of images that are padded to the largest one."""
    lengths = torch.tensor([rows * columns for rows, columns in grids], device=patches.device)
    flat = patches.permute(0, 2, 3, 1).flatten(1)  # (N, side * side * 3)
    padded = pad_sequence(list(flat.split(lengths.tolist())), batch_first=True)  # (I, most, side * side * 3)
    mask = torch.arange(padded.shape[1], device=patches.device) < lengths[:, None]
    inputs = {"pixel_values": padded, "pixel_attention_mask": mask.int(), "spatial_shapes": torch.tensor(grids)}
    return read_states(encoder, inputs, feature_layer)[mask]


def _read_merged(encoder: nn.Module, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Return the features of images whose patches stand in squares, in one row, as the encoder reads them."""
    config = cast(PreTrainedModel, encoder).config
    order = square_order(grids, config.spatial_merge_size, patches.device)
    frames = patches[order].unsqueeze(2).expand(-1, -1, config.temporal_patch_size, -1, -1)
    thw = torch.tensor([(1, *grid) for grid in grids], device=patches.device)
    merged = encoder(frames.flatten(1), grid_thw=thw, return_dict=True).pooler_output
    return merged.reshape(len(patches), -1)[order.argsort()]
