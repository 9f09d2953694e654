"""Models whose own code lets a row or image depend on the rest of its batch, or fails on a batch that others take.

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
from vlm.families.grid_positions import TYPES_INPUT, compute_by_row
from vlm.families.table import get_family

MEDIA_FEATURES = ("image_features", "video_features")
VIDEO_TYPE = 2
"""The type of a token of a video."""
NO_ID = -1


class PlacedModel(Protocol):
    """The model beneath the vocabulary head, as far as its placeholders go."""

    get_placeholder_mask: Callable[..., tuple[Tensor, ...]]

    def forward(self, **inputs: object) -> object:
        """Compute hidden states."""
        ...


class CodeOutputs(Protocol):
    """What a quantiser of images returns."""

    image_tokens: Sequence[Tensor]


class ImageQuantizer(Protocol):
    """A visual encoder that makes codes of images."""

    encode: Callable[..., CodeOutputs]


def keep_apart(model: nn.Module) -> None:
    """Let rows and images of a batch be computed as they are alone, in place; most models stay as they are."""
    compute_by_row(model)
    _tell_videos_by_type(model)
    for module in model.modules():
        if is_quantizer(module) and reads_padded_images(encode := cast(ImageQuantizer, module).encode):
            cast(ImageQuantizer, module).encode = SizedEncoding(encode)
    if get_family(cast(PreTrainedConfig, model.config).model_type).computes_all_logits:
        model.register_forward_pre_hook(_ask_for_all_logits, with_kwargs=True)


def _tell_videos_by_type(model: nn.Module) -> None:
    """Let a model that has one id for placeholders of images and of videos tell them apart, in place."""
    config, body = cast(PreTrainedConfig, model.config), cast(PlacedModel, getattr(model, "model", None))
    own = getattr(body, "get_placeholder_mask", None)
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    if own is None or isinstance(own, PlaceholdersByType) or None in ids:
        return
    if not {*MEDIA_FEATURES} <= {*inspect.signature(own).parameters}:
        return
    if TYPES_INPUT not in inspect.signature(body.forward).parameters:
        return
    image, video, *_ = own(torch.tensor([ids]), torch.zeros(1, len(ids), 1))
    if torch.equal(image, video):
        masks = PlaceholdersByType(own)
        body.get_placeholder_mask = masks
        cast(nn.Module, body).register_forward_pre_hook(masks.read_types, with_kwargs=True)


@dataclass
class PlaceholdersByType:
    """Tells placeholders of images from those of videos by the types of tokens, where both have one id.

    The code of GLM-4V takes the placeholders of a video for an image's too, and refuses a batch with both.

    Attributes:
        find: the model's `get_placeholder_mask`.
        types: those of the batch that is computed: `(rows, tokens)`.
    """

    find: Callable[..., tuple[Tensor, ...]]
    types: Tensor | None = None

    def read_types(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Keep the types of a batch, which the model is called with."""
        types = kwargs.get(TYPES_INPUT)
        self.types = types if isinstance(types, Tensor) else None

    def __call__(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return where features of images and of videos are placed: `(rows, tokens, 1)` each.

        Args:
            input_ids: `(rows, tokens)`.
            inputs_embeds: `(rows, tokens, dim)`.
            image_features: their number is compared with that of the placeholders: `(placeholders, dim)`.
            video_features: as `image_features`.
        """
        of_images = of_videos = input_ids
        if input_ids is not None and self.types is not None and self.types.shape == input_ids.shape:
            is_video = self.types == VIDEO_TYPE
            of_images = input_ids.masked_fill(is_video, NO_ID)
            of_videos = input_ids.masked_fill(~is_video, NO_ID)
        image = self.find(of_images, inputs_embeds, image_features=image_features)[0]
        video = self.find(of_videos, inputs_embeds, video_features=video_features)[1]
        return image, video


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
