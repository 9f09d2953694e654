"""A frozen visual encoder run by itself, as training would run it, and the images on their way into it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.data.blank_images import make_blank_image
from vlm.data.cache import json_digest
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.feature_cache.images import FRAME_VIEW, SQUARE_VIEW
from vlm.data.feature_cache.store import FeatureFormat
from vlm.data.sample import BadSample, ImageRef, Sample, Turn
from vlm.data.vision.jpeg import decode_sample_images
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.models.pixels import ImageOrTensor
from vlm.train.feature_cache.fingerprints import code_digest, weights_digests

BLANK_SOURCE = -1
"""In place of the number of a source: the image is a blank one."""


class FeatureRequest(NamedTuple):
    """An image that features are needed of.

    Attributes:
        record: the numbers of its source and of its record there; of a blank image, `BLANK_SOURCE` and its own number.
        place: which of the record's images it is.
        size: height and width of a blank image; None: it is no blank one.
        kind: how it is seen.
    """

    record: tuple[int, int]
    place: int
    size: tuple[int, int] | None
    kind: str


@dataclass(frozen=True)
class FrozenVisualEncoder:
    """A model's frozen encoder, run by itself as training would run it: see `frozen_visual_encoder`.

    Attributes:
        model: the model.
        processor: its processor.
        args: devices, precision, batch size, workers.
    """

    model: VLMForConditionalGeneration
    processor: VLMProcessor
    args: TrainingArguments

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features on the CPU: `(views, 3 * encoders, height, width)` before `normalise` -> `(views, P, V)`."""
        args = self.args
        half = torch.bfloat16 if args.bf16 else torch.float16
        mixed = (args.bf16 or args.fp16) and args.deepspeed is None  # DeepSpeed's models are in it as a whole
        with torch.autocast(args.device.type, half, enabled=mixed):
            return self.model.encode_images(self.processor.normalise(pixels.to(args.device))).cpu()

    def format(self) -> FeatureFormat:
        """Return what the features of a view are, by encoding a blank image."""
        blank = make_blank_image(self.processor)
        return FeatureFormat.page_aligned(self(make_image_views(self.processor, blank, SQUARE_VIEW)))

    def digest(self) -> str:
        """Return a fingerprint of all that features depend on besides the image."""
        model, processor, args = self.model, self.processor, self.args
        configs = [getattr(model.config, name).to_diff_dict() for name in model.config.encoder_names]
        steps = [step.to_dict() for step in processor.image_processors], processor.image_mode, processor.anyres
        steps = *steps, processor.alpha_background
        precision = str(model.visual_encoder.dtype), args.bf16, args.fp16, args.deepspeed is None
        weights, selections = weights_digests(model.visual_encoder), model.config.feature_selections
        code = code_digest(type(self)), inspect.getsource(make_blank_image)
        return json_digest(weights, configs, selections, steps, precision, code)


@contextmanager
def frozen_visual_encoder(
    model: VLMForConditionalGeneration, processor: VLMProcessor, args: TrainingArguments
) -> Iterator[FrozenVisualEncoder]:
    """Within, the encoder's weights are all on this rank's device, also where ZeRO-3 partitions them."""
    part = model.visual_encoder
    with ExitStack() as stack:
        if is_deepspeed_zero3_enabled():
            import deepspeed  # takes seconds

            stack.enter_context(deepspeed.zero.GatheredParameters(list(part.parameters())))
        if next(part.parameters()).device != args.device:
            part.to(args.device)  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        part.eval()
        yield FrozenVisualEncoder(model, processor, args)


def open_images(
    image_refs: Sequence[ImageRef], sample_id: str, processor: VLMProcessor
) -> list[ImageOrTensor | BadSample]:
    """Decode images of a sample; a `BadSample` for each that does not open."""
    try:
        images = decode_sample_images(Sample(sample_id, (Turn("user", tuple(image_refs)),)), processor)
        return cast("list[ImageOrTensor | BadSample]", list(images))  # no videos
    except BadSample as error:
        if len(image_refs) == 1:
            return [error]
        return [image for image_ref in image_refs for image in open_images([image_ref], sample_id, processor)]


def make_image_views(processor: VLMProcessor, image: ImageOrTensor, kind: str) -> Tensor:
    """Return an image's `(views, 3 * encoders, height, width)`, before `normalise`, for the way in which it is seen."""
    if processor.tiling is not None and kind == FRAME_VIEW:
        return processor.image_inputs([image], [None])["pixel_values"]
    if processor.tiling is not None and kind == SQUARE_VIEW:  # as one of several it has no tiles
        return processor.image_inputs([image, image])["pixel_values"][:1]
    return processor.image_inputs([image])["pixel_values"]


def make_record_views(
    processor: VLMProcessor, image: ImageOrTensor | BadSample, kind: str, image_ref: ImageRef, sample_id: str
) -> Tensor:
    """Return `make_image_views` of an image of a record.

    Raises:
        BadSample: it did not open, or the processor refuses it.
    """
    if isinstance(image, BadSample):
        raise image
    make = partial(make_image_views, processor, image, kind)
    with processor_errors("the processor", sample_id, [image_ref], lambda _: make()):
        return make()
