"""How many floating-point operations a step of training needs: counted out of the model as it is, not estimated.

A copy of the model without storage runs forward and backward under PyTorch's own counter, with the same layers,
adapters and frozen parameters: what gets no gradient is not counted, nor is what checkpointing computes anew. A
multiplication and an addition are two operations; only matrix products and convolutions count, as is the custom.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm.assembly.checkpoint import is_composed_model
from vlm.data.batching.stats import BatchStats, num_images
from vlm.families.table import FAMILIES
from vlm.models import VLMForConditionalGeneration

BASE_LENGTH = 32
"""Tokens of the shortest text that is counted; others are multiples of it."""

NUM_COUNTED_IMAGES = 2
"""So many images are counted at once: batch norm needs more than one value."""


PATCH_MASK_FAMILIES = {"idefics3", "smolvlm"}
"""Families whose encoder takes a mask of patches."""

FIXED_IMAGE_SIZE_FAMILIES = {
    "llava", "llava_next", "llava_next_video", "llava_onevision", "internvl", "paligemma", "gemma3", *PATCH_MASK_FAMILIES
}  # fmt: skip
"""Families whose encoder reads pictures, tiles and frames of one size, by themselves: each costs the same."""


class FlopsNotCountable(Exception):
    """Why a model's operations cannot be counted."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of training, forward and backward.

    Attributes:
        token: of each token in the language model, attention aside.
        pair: of each token and each token that it attends to: itself and those before it.
        supervised: of each learnt token, in the vocabulary head.
        encoded: of each image in the visual encoder; of a family's model, in its connector too.
        connected: of each image in the connector.
        batch: of each batch, whatever it holds: what queries cost that are the same for all images.
    """

    token: float
    pair: float
    supervised: float
    encoded: float
    connected: float
    batch: float

    def total(self, facts: BatchStats, encoded: float, connected: float, batches: float) -> float:
        """Those of so many batches with these facts, whose visual encoder and connector read so many images.

        Attention is counted as causal over each sample by itself: a sample of T tokens has T (T + 1) / 2 pairs.
        """
        pairs = (facts.squared_lengths + facts.tokens) / 2
        text = self.token * facts.tokens + self.pair * pairs + self.supervised * facts.supervised
        return text + self.encoded * encoded + self.connected * connected + self.batch * batches


def count_flops(model: Any, image: Mapping[str, Any]) -> StepFlops:
    """Count a model that is ready to train: its adapters are in place, and what is frozen is.

    Args:
        model: the model, before DeepSpeed or a compiler wraps it. It is not changed, nor is any of it copied.
        image: what the model reads of an image, as the processor gives it.

    Raises:
        FlopsNotCountable: the model does not allow it; says why.
    """
    kind = model.config.model_type
    composed = is_composed_model(model)
    if not composed and kind not in FIXED_IMAGE_SIZE_FAMILIES:
        raise FlopsNotCountable(
            f"the cost of an image is not the same for all in model_type={kind}" if kind in FAMILIES else
            f"model_type={kind} does not learn to write alone"
        )  # fmt: skip
    try:
        meta_model = copy_to_meta_device(model)
        return _count_step_flops(
            meta_model,
            _count_composed_images(meta_model, image) if composed else _count_family_images(meta_model, image),
        )
    except FlopsNotCountable:
        raise
    except Exception as error:  # a language model of anybody's: a run does not end for a figure in its log
        raise FlopsNotCountable(f"without data, it does not run: {type(error).__name__}: {error}") from error


def copy_to_meta_device(model: nn.Module) -> Any:
    """A copy of a model on the meta device, in float32 and with plain attention, that trains what the model trains."""
    replaced: dict[int, Any] = {}
    for one in (*model.parameters(), *model.buffers()):
        shape = getattr(one, "ds_shape", one.shape)  # ZeRO-3 has shared it out
        blank = torch.empty(shape, dtype=torch.float32 if one.is_floating_point() else one.dtype, device="meta")
        if isinstance(one, nn.Parameter):
            _check_not_quantised(one)
            blank = nn.Parameter(blank, requires_grad=one.requires_grad)
        replaced[id(one)] = blank
    meta_model = copy.deepcopy(model, replaced)
    for module in meta_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType] - a flag of transformers
        config: Any = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return meta_model.train()


def _check_not_quantised(parameter: nn.Parameter) -> None:
    if getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point():
        raise FlopsNotCountable("it has matrices that are stored in 4 or 8 bits")


def _count_step_flops(model: Any, images: "ImageFlops") -> StepFlops:
    """Count the language model of a model without storage, and put it beside what its images cost."""
    if any(p.ndim > 2 for p in model.get_decoder().parameters()):
        raise FlopsNotCountable("its language model has experts or convolutions, whose cost the lengths do not tell")
    needs_gradient = images.needs_gradient or any(p.requires_grad for p in model.get_input_embeddings().parameters())

    def text(length: int, supervised: int) -> int:
        return _count_language_model_flops(model, length, supervised, needs_gradient)

    base, longer = text(BASE_LENGTH, 1), text(2 * BASE_LENGTH, 1)
    supervised = text(BASE_LENGTH, 2) - base
    base, longer = base - supervised, longer - supervised
    square = (longer - 2 * base) / (2 * BASE_LENGTH**2)
    token = (base - square * BASE_LENGTH**2) / BASE_LENGTH
    predicted = token * 3 * BASE_LENGTH + square * 9 * BASE_LENGTH**2 + supervised
    if not math.isclose(text(3 * BASE_LENGTH, 1), predicted, rel_tol=1e-9):
        raise FlopsNotCountable("the cost of its language model is no square function of the length")
    return StepFlops(token, square, supervised, images.encoded, images.connected, images.batch)


@dataclass(frozen=True)
class ImageFlops:
    """What images cost, as `StepFlops` has it, and whether their tokens get a gradient."""

    encoded: float
    connected: float
    batch: float
    needs_gradient: bool


def _count_composed_images(model: VLMForConditionalGeneration, image: Mapping[str, Any]) -> ImageFlops:
    """Count the visual encoder and the connector of a composed model."""
    pixels = torch.empty(2 * NUM_COUNTED_IMAGES, *image["pixel_values"].shape[1:], device="meta")
    (few, _), (many, features) = (
        _count_encoder_flops(model, pixels[:NUM_COUNTED_IMAGES]),
        _count_encoder_flops(model, pixels),
    )
    encoded, shared = (many - few) / NUM_COUNTED_IMAGES, 2 * few - many
    (few, needs_gradient), (many, _) = (
        _count_connector_flops(model, features[:NUM_COUNTED_IMAGES]),
        _count_connector_flops(model, features),
    )
    if model.image_newline is not None:
        needs_gradient |= any(p.requires_grad for p in model.image_newline.parameters())
    return ImageFlops(encoded, (many - few) / NUM_COUNTED_IMAGES, shared + 2 * few - many, needs_gradient)


def _count_encoder_flops(model: VLMForConditionalGeneration, pixels: Tensor) -> tuple[int, Tensor]:
    """Operations of the visual encoder, and its features."""
    trains = any(p.requires_grad for p in model.visual_encoder.parameters())
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(trains):
            features = model.encode_images(pixels)
        _backward(features)
    return counter.get_total_flops(), features


def _count_connector_flops(model: VLMForConditionalGeneration, features: Tensor) -> tuple[int, bool]:
    """Operations of the connector, and whether its tokens get a gradient."""
    features = features.detach().requires_grad_(features.requires_grad)
    with FlopCounterMode(display=False) as counter:
        tokens = model.connector(features)
        _backward(tokens)
    return counter.get_total_flops(), tokens.requires_grad


def _count_family_images(model: Any, image: Mapping[str, Any]) -> ImageFlops:
    """Count what a family's model does with an image, its encoder and what stands behind it together."""
    pixels = torch.empty(image["pixel_values"].shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        if model.config.model_type in PATCH_MASK_FAMILIES:
            features = [_encode_with_patch_mask(model.model, pixels.flatten(0, -4))]
        else:
            sizes = {"image_sizes": image["image_sizes"]} if "image_sizes" in image else {}
            found = model.get_image_features(pixel_values=pixels, return_dict=True, **sizes).pooler_output
            features = [found] if isinstance(found, Tensor) else list(found)
        _backward(torch.cat(features))
    encoded = counter.get_total_flops() / num_images(image)
    return ImageFlops(encoded, 0.0, 0.0, any(one.requires_grad for one in features))


def _encode_with_patch_mask(model: Any, pixels: Tensor) -> Tensor:
    """Features of Idefics3's kind, whose own call looks at which patches are padding: `(I, 3, h, w) -> (I, N, D)`."""
    encoder = model.vision_model
    patches = [side // encoder.config.patch_size for side in pixels.shape[-2:]]
    mask = torch.ones(len(pixels), *patches, dtype=torch.bool, device="meta")
    states = encoder.encoder(inputs_embeds=encoder.embeddings(pixel_values=pixels, patch_attention_mask=mask))
    return model.connector(encoder.post_layernorm(states.last_hidden_state))


def _count_language_model_flops(model: Any, length: int, supervised: int, needs_gradient: bool) -> int:
    """Operations of the language model over a text of which the last tokens are learnt."""
    width = model.get_input_embeddings().weight.shape[1]
    inputs = torch.empty(1, length, width, device="meta", requires_grad=needs_gradient)
    mask = torch.empty(1, 1, length, length, device="meta")  # given, since models look into positions to make theirs
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_decoder()(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        _backward(model.get_output_embeddings()(hidden[:, -supervised:]))
    return counter.get_total_flops()


def _backward(output: Tensor) -> None:
    if output.requires_grad:
        output.sum().backward()
