"""The memory of a training step, counted on a copy of the model that has shapes and no numbers.

Tensors of the copy are fake ones of PyTorch: each operation says what shape and type its result has, and computes
nothing. Kernels are chosen as on the CPU: attention keeps no matrix of scores, as on GPUs. See `live_bytes.py` for what
is not seen.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm.assembly.model_kinds import is_composed_model
from vlm.data.batching.stats import ModelInputs
from vlm.models.text_loss import chunked_scores, mean_loss
from vlm.models.vocabulary import find_vocabulary_head
from vlm.train.monitor.flops import FIXED_IMAGE_SIZE_FAMILIES, PATCH_MASK_FAMILIES, encode_with_patch_mask
from vlm.train.preflight.live_bytes import LiveBytes

ModelT = TypeVar("ModelT", bound=nn.Module)

SAMPLE_BY_SAMPLE = "preflight_packed"
"""The name under which attention within packed samples is registered, whose lengths are known without numbers."""


class MemoryNotCountable(Exception):
    """The memory of a model's step cannot be counted without data; the message says why."""


@dataclass(frozen=True)
class BatchShape:
    """What the memory of a batch depends on.

    Attributes:
        rows: number of rows.
        tokens: number of positions of a row, padding and image tokens included.
        images: number of images that are encoded; tiles and frames count one by one.
        supervised: number of supervised tokens.
        lengths: of packed samples in the one row; empty: the batch is not packed.
    """

    rows: int
    tokens: int
    images: int
    supervised: int
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step beside weights and the states of the optimiser.

    Attributes:
        activations: the most that activations, batches and the like take at once.
        with_gradients: the most that they and the gradients take together, where gradients stay until the step ends.
        gradients: of all parameters that train.
    """

    activations: int
    with_gradients: int
    gradients: int


def count_step_bytes(
    model: PreTrainedModel, image: ModelInputs, batches: Sequence[BatchShape], dtype: torch.dtype
) -> StepBytes:
    """Count the memory of a step of a model that is ready to train; it is not changed, and no weight is copied.

    Args:
        model: real, or on the meta device; with its adapters, frozen parameters and checkpointed layers.
        image: its inputs for an image, as the processor returns them.
        batches: the micro-batches of the step, one after the other.
        dtype: the precision of matrix products.

    Raises:
        MemoryNotCountable: the model does not run without data.
    """
    if not is_composed_model(model) and model.config.model_type not in FIXED_IMAGE_SIZE_FAMILIES:
        raise MemoryNotCountable(f"images of model_type={model.config.model_type} have different numbers of tokens")
    # Sizes of images decide on shapes, so that they have to be numbers.
    image = {name: value.tolist() if name == "image_sizes" else value for name, value in image.items()}
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = copy_to_fake(model, mode)
        kept = _run_step(fake, mode, image, batches, dtype, keeps_gradients=True)
        freed = _run_step(fake, mode, image, batches, dtype, keeps_gradients=False)
    except MemoryNotCountable:
        raise
    except Exception as error:  # any model may come here, and no run should end for a figure
        said = " ".join(str(error).split())[:200]
        raise MemoryNotCountable(f"without data, it does not run: {type(error).__name__}: {said}") from error
    gradients = sum(p.numel() * p.element_size() for p in fake.parameters() if p.requires_grad)
    return StepBytes(freed, kept, gradients)


def copy_to_fake(model: ModelT, mode: FakeTensorMode) -> ModelT:
    """Return a copy of a model with fake tensors in their own precisions, ready to train.

    Raises:
        MemoryNotCountable: it has matrices in 4 or 8 bits.
    """
    replaced: dict[int, Tensor] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            blank = torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                if getattr(tensor, "quant_state", None) is not None or not tensor.is_floating_point():
                    raise MemoryNotCountable("it has matrices that are stored in 4 or 8 bits")
                blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = blank
        fake = copy.deepcopy(model, replaced)
    for module in fake.modules():
        for handle, hook in list(module._forward_hooks.items()):
            if not getattr(hook, "__module__", "").startswith("transformers."):  # those take outputs of layers
                del module._forward_hooks[handle]
    return fake.train()


def _run_step(
    model: PreTrainedModel,
    mode: FakeTensorMode,
    image: ModelInputs,
    batches: Sequence[BatchShape],
    dtype: torch.dtype,
    *,
    keeps_gradients: bool,
) -> int:
    """Return the most bytes that are alive in a step beside the model; with its gradients, or with each freed at once.

    Weights in another precision than that of matrix products are copied into it once a batch, which counts.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    hooks = [] if keeps_gradients else [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with mode, LiveBytes((*model.parameters(), *model.buffers())) as live:
        for batch in batches:
            with _attend(model, batch):  # around the backward pass too, which may compute layers anew
                with autocast:
                    loss = _loss(model, image, batch)
                loss.backward()
                del loss
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(model: PreTrainedModel, image: ModelInputs, batch: BatchShape) -> Tensor:
    """Return the loss of a batch of this shape, computed as a run computes it."""
    ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
    positions = torch.arange(batch.tokens)[None].expand(batch.rows, -1)
    embeddings = model.get_input_embeddings()(ids)
    if batch.images:
        features = _image_features(model, image, batch.images).to(embeddings.dtype)
        placeholders = torch.zeros(batch.rows, batch.tokens, 1, dtype=torch.bool)
        embeddings = embeddings.masked_scatter(placeholders, features)
        del features
    mask = None
    if not batch.lengths:
        mask = torch.ones(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool)
    inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    del embeddings, mask, inputs
    supervised = hidden.flatten(0, 1)[: batch.supervised]
    supervised = supervised.index_select(0, torch.arange(len(supervised)))  # a copy, as a mask makes it
    targets = torch.zeros(len(supervised), dtype=torch.long)
    head = cast(nn.Module, find_vocabulary_head(model))
    return mean_loss(chunked_scores(head, supervised, targets, model.config.get_text_config().vocab_size), None)


def _image_features(model: PreTrainedModel, image: ModelInputs, number: int) -> Tensor:
    """Return the tokens of images, `(tokens, D)` or of more dimensions."""
    pixels = image["pixel_values"]
    if is_composed_model(model):
        if model.native is not None:
            raise MemoryNotCountable("images at native resolution have different numbers of tokens")
        features = model.encode_images(torch.empty(number, *pixels.shape[1:]))
        return model.connector(features.to(next(model.connector.parameters(), features).dtype))
    if model.config.model_type in PATCH_MASK_FAMILIES:
        return encode_with_patch_mask(model.model, torch.empty(number, *pixels.shape[-3:]))
    repeats = -(-number // max(pixels.shape[:-3].numel(), 1))
    shape = (pixels.shape[0] * repeats, *pixels.shape[1:])
    sizes = {"image_sizes": image["image_sizes"] * repeats} if "image_sizes" in image else {}
    encode = cast(Callable[..., BaseModelOutputWithPooling], model.get_image_features)
    features = encode(pixel_values=torch.empty(shape), return_dict=True, **sizes).pooler_output
    return features if isinstance(features, Tensor) else torch.cat(list(features or ()))


@contextmanager
def _attend(model: PreTrainedModel, batch: BatchShape) -> Iterator[None]:
    """Let the language model attend within packed samples, where the batch has some and it uses `sdpa`."""
    config = cast(Any, model.config.get_text_config())  # transformers lets a mapping be set
    before = config._attn_implementation
    if batch.lengths and before == "sdpa":
        AttentionInterface.register(SAMPLE_BY_SAMPLE, partial(_packed_attention, list(batch.lengths)))
        config._attn_implementation = {"": SAMPLE_BY_SAMPLE}
    try:
        yield
    finally:
        config._attn_implementation = {"": before}


def _packed_attention(
    lengths: list[int],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend causally within each of the samples of a row, as `vlm.assembly.packed_attention` does."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in samples
    ]
    return torch.cat(outputs, dim=1), None
