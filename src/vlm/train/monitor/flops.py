"""The floating-point operations of a training step, counted on the model itself, not estimated.

A copy of the model on the meta device runs under PyTorch's own counter, with the same adapters and frozen parameters.
A multiplication and an addition are two operations; only matrix products and convolutions count, as is usual, and no
recomputation by activation checkpointing. In a mixture of experts, each token counts only in its active experts.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vlm.assembly.model_kinds import is_composed_model, is_prediction_model
from vlm.data.batching.stats import BatchStats, ModelInputs, num_images
from vlm.models import VLMForConditionalGeneration
from vlm.models.vocabulary import find_vocabulary_head

BASE_LENGTH = 32
"""Tokens of the shortest counted text; the others are multiples of it."""

NUM_COUNTED_IMAGES = 2
"""Images that are counted at once: batch norm needs more than one value."""

PATCH_MASK_FAMILIES = {"idefics3", "smolvlm"}
"""Families whose encoder takes a mask of patches, besides the pixels."""

FIXED_IMAGE_SIZE_FAMILIES = PATCH_MASK_FAMILIES | {
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "internvl", "paligemma", "gemma3"),
}
"""Families whose encoder reads images, tiles and frames of one size, one by one: each costs the same."""


class FlopsNotCountable(Exception):
    """A model's operations cannot be counted; the message says why."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of training, forward and backward: of one token, one pair of tokens, one image and so on."""

    token: float  # a token in the language model, attention aside
    pair: float  # a token and one that it attends to: itself or an earlier one
    supervised: float  # a supervised token in the vocabulary head
    encoded: float  # an image in the visual encoder; in family models, in the connector too
    connected: float  # an image in the connector
    batch: float  # a batch, whatever it holds: the cost of queries that all images share

    def total(self, stats: BatchStats, encoded: float, connected: float, batches: float) -> float:
        """Return the operations of batches with these statistics, and of images encoded and connected.

        Attention is counted as causal over each sample by itself: a sample of T tokens has T (T + 1) / 2 pairs.
        """
        pairs = (stats.squared_lengths + stats.tokens) / 2
        text = self.token * stats.tokens + self.pair * pairs + self.supervised * stats.supervised
        return text + self.encoded * encoded + self.connected * connected + self.batch * batches


def count_flops(model: PreTrainedModel, image: ModelInputs) -> StepFlops:
    """Count the operations of a model that is ready to train, with its adapters and its frozen parameters.

    It must not be wrapped by DeepSpeed or a compiler yet. It is not changed, and no weight is copied. `image` holds its
    inputs for one image, as the processor returns them.
    """
    kind = model.config.model_type
    composed = is_composed_model(model)
    if is_prediction_model(model):
        raise FlopsNotCountable("it has prediction heads")
    if not composed and kind not in FIXED_IMAGE_SIZE_FAMILIES:
        raise FlopsNotCountable(f"the cost of an image is not the same for all in model_type={kind}")
    try:
        meta_model = copy_to_meta_device(model)
        count_images = _count_composed_images if composed else _count_family_images
        return _count_step_flops(meta_model, count_images(meta_model, image))
    except FlopsNotCountable:
        raise
    except Exception as error:  # any language model may come here, and no run should end for a figure in its log
        raise FlopsNotCountable(f"it does not run on meta tensors: {type(error).__name__}: {error}") from error


def copy_to_meta_device(model: nn.Module) -> Any:
    """Return a copy of a model on the meta device, in float32, with eager attention and the same frozen parameters."""
    replaced: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        shape = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO-3 has sharded it
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        blank = torch.empty(shape, dtype=dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            if getattr(tensor, "quant_state", None) is not None or not tensor.is_floating_point():
                raise FlopsNotCountable("it has matrices in 4 or 8 bits")
            blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = blank
    meta_model = copy.deepcopy(model, replaced)
    for module in meta_model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType] - a flag of transformers
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return meta_model.train()


class OperationCounter(TorchDispatchMode):
    """Counts by the formulas of PyTorch's counter, without what that does for a table of modules: half of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = FlopCounterMode(display=False).flop_registry

    def __torch_dispatch__(
        self,
        func: OpOverload[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation and add what it costs."""
        output = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def _count_passes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the operations of a forward pass and its backward pass, and the output."""
    with OperationCounter() as counter:
        output = forward()
        if output.requires_grad:
            output.sum().backward()
    return counter.total, output


def _count_step_flops(model: Any, images: "ImageFlops") -> StepFlops:
    """Count the language model of a model on the meta device, and add what its images cost."""
    _count_active_experts(model.get_decoder())
    embeddings, head = model.get_input_embeddings(), cast(nn.Module, find_vocabulary_head(model))
    needs_gradient = images.needs_gradient or any(p.requires_grad for p in embeddings.parameters())
    states: list[Tensor] = []

    def text(length: int) -> int:
        """Return the operations for a text whose last token is supervised."""
        inputs = torch.empty(1, length, embeddings.weight.shape[1], device="meta", requires_grad=needs_gradient)
        mask = torch.empty(1, 1, length, length, device="meta")  # given, since models read positions to make their own

        def predict() -> Tensor:
            """Return the logits of the last token."""
            outputs = model.get_decoder()(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
            states.append(outputs.last_hidden_state)
            return head(states[-1][:, -1:])

        return _count_passes(predict)[0]

    base, longer = text(BASE_LENGTH), text(2 * BASE_LENGTH)
    last = states[-1][:, -1:].detach().requires_grad_(states[-1].requires_grad)
    supervised, _ = _count_passes(lambda: head(last))
    base, longer = base - supervised, longer - supervised
    square = (longer - 2 * base) / (2 * BASE_LENGTH**2)
    token = (base - square * BASE_LENGTH**2) / BASE_LENGTH
    predicted = token * 3 * BASE_LENGTH + square * 9 * BASE_LENGTH**2 + supervised
    if not math.isclose(text(3 * BASE_LENGTH), predicted, rel_tol=1e-9):
        raise FlopsNotCountable("the cost of its language model is not a quadratic function of the length")
    return StepFlops(token, square, supervised, images.encoded, images.connected, images.batch)


EXPERT_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
"""The arguments of transformers' modules of experts, whose parameters have the expert as their first dimension."""


def _count_active_experts(decoder: nn.Module) -> None:
    """Make expert modules of a model on the meta device compute only what `num_experts_per_tok` experts compute.

    Which experts a token uses depends on its values, but the number of experts does not. Each matrix of an expert is
    multiplied with one row for each token that uses the expert.

    Raises:
        FlopsNotCountable: there are experts of another kind, or convolutions.
    """
    for module in decoder.modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 2]
        if not matrices:
            continue
        arguments = list(inspect.signature(module.forward).parameters)[: len(EXPERT_ARGUMENTS)]
        if arguments != EXPERT_ARGUMENTS or any(matrix.ndim != 3 for matrix in matrices):
            raise FlopsNotCountable(
                "its language model has convolutions or special experts, whose cost does not follow from the lengths"
            )
        module.forward = partial(_multiply_active_experts, matrices)


def _multiply_active_experts(
    matrices: list[nn.Parameter], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return a tensor `(tokens, width)` whose forward and backward cost is that of the active experts."""
    number = top_k_index.shape[-1]
    rows = hidden_states.sum(-1).flatten()[:, None].repeat(number, 1)  # (active * tokens, 1)
    products = [rows.expand(-1, matrix.shape[1]) @ matrix[0] for matrix in matrices]
    return hidden_states * top_k_weights.sum() + sum(product.sum() for product in products)


@dataclass(frozen=True)
class ImageFlops:
    """The operations for images, as in `StepFlops`, and whether their tokens get a gradient."""

    encoded: float
    connected: float
    batch: float
    needs_gradient: bool


def _count_composed_images(model: VLMForConditionalGeneration, image: ModelInputs) -> ImageFlops:
    """Count the visual encoder and the connector of a composed model, each on some images and on twice as many."""
    if model.native is not None:
        raise FlopsNotCountable("images at native resolution have different costs")
    pixels = torch.empty(2 * NUM_COUNTED_IMAGES, *image["pixel_values"].shape[1:], device="meta")
    trains = any(p.requires_grad for p in model.visual_encoder.parameters())

    def encode(number: int) -> Tensor:
        """Return the features of the first images."""
        with torch.set_grad_enabled(trains):
            return model.encode_images(pixels[:number])

    few, _ = _count_passes(lambda: encode(NUM_COUNTED_IMAGES))
    many, features = _count_passes(lambda: encode(2 * NUM_COUNTED_IMAGES))
    encoded, shared = (many - few) / NUM_COUNTED_IMAGES, 2 * few - many
    features = features.detach().requires_grad_(features.requires_grad)
    few, _ = _count_passes(lambda: model.connector(features[:NUM_COUNTED_IMAGES]))
    many, tokens = _count_passes(lambda: model.connector(features))
    needs_gradient = tokens.requires_grad
    if model.image_newline is not None:
        needs_gradient |= any(p.requires_grad for p in model.image_newline.parameters())
    return ImageFlops(encoded, (many - few) / NUM_COUNTED_IMAGES, shared + 2 * few - many, needs_gradient)


def _count_family_images(model: Any, image: ModelInputs) -> ImageFlops:
    """Count the operations of a family's model for an image, in its encoder and connector together."""
    pixels = torch.empty(image["pixel_values"].shape, device="meta")
    sizes = {"image_sizes": image["image_sizes"]} if "image_sizes" in image else {}

    def encode() -> Tensor:
        """Return the features of all images."""
        if model.config.model_type in PATCH_MASK_FAMILIES:
            return encode_with_patch_mask(model.model, pixels.flatten(0, -4))
        features = model.get_image_features(pixel_values=pixels, return_dict=True, **sizes).pooler_output
        return features if isinstance(features, Tensor) else torch.cat(list(features))

    operations, features = _count_passes(encode)
    return ImageFlops(operations / num_images(image), 0.0, 0.0, features.requires_grad)


def encode_with_patch_mask(model: Any, pixels: Tensor) -> Tensor:
    """Return features of Idefics3's encoder, all patches being real: `(I, 3, h, w) -> (I, N, D)`."""
    encoder = model.vision_model
    patches = [side // encoder.config.patch_size for side in pixels.shape[-2:]]
    mask = torch.ones(len(pixels), *patches, dtype=torch.bool, device=pixels.device)
    states = encoder.encoder(inputs_embeds=encoder.embeddings(pixel_values=pixels, patch_attention_mask=mask))
    return model.connector(encoder.post_layernorm(states.last_hidden_state))
