"""Models whose own code lets a row or image depend on what stands beside it in a batch, or takes no mask of positions.

`keep_apart` changes such a model in place, wherever one is loaded: what it computes of a row alone stays as it is.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlm.families.derive_parts import is_quantizer
from vlm.families.grid_positions import compute_by_row
from vlm.families.table import get_family


class CodeOutputs(Protocol):
    """What a quantiser of images returns."""

    image_tokens: Sequence[Tensor]


class ImageQuantizer(Protocol):
    """A visual encoder that makes codes of images."""

    encode: Callable[..., CodeOutputs]


def keep_apart(model: nn.Module) -> None:
    """Let rows and images of a batch be computed as they are alone, in place; most models stay as they are."""
    compute_by_row(model)
    for module in model.modules():
        if is_quantizer(module) and reads_padded_images(encode := cast(ImageQuantizer, module).encode):
            cast(ImageQuantizer, module).encode = SizedEncoding(encode)
    if get_family(cast(PreTrainedConfig, model.config).model_type).computes_all_logits:
        model.register_forward_pre_hook(_ask_for_all_logits, with_kwargs=True)


def reads_padded_images(encode: Callable[..., CodeOutputs]) -> bool:
    """Return whether a quantiser's function takes images of several sizes in one tensor, and sees their padding."""
    return not isinstance(encode, SizedEncoding) and "image_sizes" in inspect.signature(encode).parameters


@dataclass(frozen=True)
class SizedEncoding:
    """Encodes images of each size together, without the padding that makes images of several sizes one batch.

    Emu3's convolutions and norms see the padding, so that the codes of an image depend on the largest one of its batch.

    Attributes:
        encode: the quantiser's own.
    """

    encode: Callable[..., CodeOutputs]

    def __call__(self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: object) -> CodeOutputs:
        """Return the codes of each image, `(height, width)` of its own.

        Args:
            pixel_values: `(images, 3, height, width)`, padded at the bottom and on the right.
            image_sizes: height and width of each image without padding, in pixels: `(images, 2)`.
            kwargs: passed on.
        """
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        outputs: CodeOutputs | None = None
        codes: dict[int, Tensor] = {}
        for height, width in dict.fromkeys(sizes):
            places = [place for place, size in enumerate(sizes) if size == (height, width)]
            outputs = self.encode(pixel_values[places, :, :height, :width], image_sizes[places], **kwargs)
            codes |= dict(zip(places, outputs.image_tokens, strict=True))
        assert outputs is not None
        outputs.image_tokens = [codes[place] for place in range(len(sizes))]
        return outputs


def _ask_for_all_logits(
    module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Ask for the logits of all positions in place of those of a mask."""
    keep = kwargs.get("logits_to_keep")
    is_mask = isinstance(keep, Tensor) and keep.dtype == torch.bool
    return args, {**kwargs, "logits_to_keep": 0} if is_mask else dict(kwargs)
