"""A frozen visual encoder run by itself, as training would run it, and the images on their way into it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.data.cache import json_digest
from vlm.data.dataset import make_blank_image
from vlm.data.feature_cache.dataset import BLANK_SIZE, FRAME_VIEW, SQUARE_VIEW
from vlm.data.feature_cache.reader import FeatureFormat
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source
from vlm.data.vision.images import open_image, upright_size
from vlm.data.vision.jpeg import decode_sample_images
from vlm.models import VLMForConditionalGeneration, VLMProcessor
from vlm.train.feature_cache.fingerprints import code_digest, weights_digests

BLANK_SOURCE = -1
"""In place of the number of a source: the image is a blank one."""

OpenedImage = Image.Image | Tensor

ImageViews = tuple[Tensor, tuple[int, int]]
"""What the encoder reads of an image, `(views, 3 * encoders, height, width)`, and the image's height and width."""


@dataclass(frozen=True)
class FeatureRequest:
    """An image that features are needed of.

    Attributes:
        source: the number of its source, or `BLANK_SOURCE`.
        record: the number of its record there.
        place: which of the record's images it is.
        kind: how it is seen.
        size: height and width of a blank image.
    """

    source: int
    record: int
    place: int
    kind: str
    size: tuple[int, int] = BLANK_SIZE


class FrozenVisualEncoder:
    """A model's frozen encoder, ready to be run by itself: as training would run it.

    Within the context its weights are all on this rank's device, also where ZeRO-3 partitions them.

    Args:
        model: the model.
        processor: its processor.
        args: devices, precision, batch size, workers.
    """

    def __init__(self, model: VLMForConditionalGeneration, processor: VLMProcessor, args: TrainingArguments):
        self.model, self.processor, self.args = model, processor, args
        self.exit_stack = ExitStack()

    def __enter__(self) -> "FrozenVisualEncoder":
        encoder = self.model.visual_encoder
        self.exit_stack.enter_context(gathered_parameters(encoder))
        if next(encoder.parameters()).device != self.args.device:
            encoder.to(self.args.device)  # pyright: ignore[reportArgumentType] - as PyTorch declares it
        encoder.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.exit_stack.close()

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
        pixels, _ = make_image_views(self.processor, make_blank_image(self.processor), SQUARE_VIEW)
        return FeatureFormat.page_aligned(self(pixels))

    def digest(self) -> str:
        """Return a fingerprint of all that features depend on besides the image."""
        model, processor, args = self.model, self.processor, self.args
        configs = [getattr(model.config, name).to_diff_dict() for name in model.config.encoder_names]
        steps = [step.to_dict() for step in processor.image_processors], processor.image_mode, processor.anyres
        precision = str(model.visual_encoder.dtype), args.bf16, args.fp16, args.deepspeed is None
        weights, selections = weights_digests(model.visual_encoder), model.config.feature_selections
        code = code_digest(type(self)), inspect.getsource(make_blank_image)
        return json_digest(weights, configs, selections, steps, precision, code)


@contextmanager
def gathered_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Within, a module's weights are whole, also where ZeRO-3 partitions them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # takes seconds

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


class RequestedImages(Dataset[list[tuple[int, ImageViews | BadSample]]]):
    """Images as the encoder reads them, those of a record together.

    Args:
        processor: the model's.
        sources: of all records.
        requests: the images.
        groups: of each item, the numbers of its requests, which are of one record or one blank image.
    """

    def __init__(
        self, processor: VLMProcessor, sources: Sequence[Source], requests: Sequence[FeatureRequest],
        groups: Sequence[list[int]],
    ):  # fmt: skip
        self.processor, self.sources, self.requests, self.groups = processor, sources, requests, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[tuple[int, ImageViews | BadSample]]:
        """Number and views of each image, or why it does not open."""
        numbers = self.groups[index]
        requests = [self.requests[number] for number in numbers]
        first = requests[0]
        if first.source == BLANK_SOURCE:
            images: list[OpenedImage | BadSample] = [make_blank_image(self.processor, first.size)]
        else:
            sample = self.sources[first.source].sample(first.record)
            images = open_requested_images(sample, [request.place for request in requests], self.processor)
        return [
            (number, image if isinstance(image, BadSample) else make_image_views(self.processor, image, request.kind))
            for number, request, image in zip(numbers, requests, images, strict=True)
        ]


def open_requested_images(
    sample: Sample, places: Sequence[int], processor: VLMProcessor
) -> list[OpenedImage | BadSample]:
    """Return some images of a sample, decoded; a `BadSample` for each that does not open."""
    if len(places) == len(sample.images):
        try:
            return [*decode_sample_images(sample, processor)]
        except BadSample:
            pass  # opened one by one, it turns out which do not open
    images: list[OpenedImage | BadSample] = []
    for place in places:
        try:
            images.append(open_image(sample.images[place], sample.id))
        except BadSample as error:
            images.append(error)
    return images


def make_image_views(processor: VLMProcessor, image: OpenedImage, kind: str) -> ImageViews:
    """Return what the encoder reads of an image that is seen in some way, before `normalise`, and the image's size."""
    if processor.tiling is None:
        return processor.image_inputs([image])["pixel_values"], upright_size(image)
    if kind == FRAME_VIEW:
        inputs = processor.image_inputs([image], [None])
    elif kind == SQUARE_VIEW:  # as one of several it has no tiles
        inputs = {name: value[:1] for name, value in processor.image_inputs([image, image]).items()}
    else:
        inputs = processor.image_inputs([image])
    height, width = inputs["image_sizes"][0].tolist()
    return inputs["pixel_values"], (height, width)
