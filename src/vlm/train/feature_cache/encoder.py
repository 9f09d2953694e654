"""A frozen visual encoder run by itself, as training would run it, and the pictures on their way into it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
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
from vlm.train.feature_cache.fingerprints import code_digest, weights_digests

BLANK_SOURCE = -1
"""In place of the number of a source: the picture is a blank one."""


@dataclass(frozen=True)
class FeatureRequest:
    """A picture that features are wanted of.

    Attributes:
        source: the number of its source, or `BLANK`.
        record: of its record there.
        place: which of the record's pictures it is.
        kind: how it is seen.
        size: height and width of a blank picture.
    """

    source: int
    record: int
    place: int
    kind: str
    size: tuple[int, int] = BLANK_SIZE


class FrozenVisualEncoder:
    """A model's frozen encoder, ready to be run by itself: as training would run it.

    Within the context its weights are all on this rank's device, also where ZeRO-3 shares them out.

    Args:
        model: the model.
        processor: its processor.
        args: devices, precision, batch size, workers.
    """

    def __init__(self, model: Any, processor: Any, args: TrainingArguments):
        self.model, self.processor, self.args = model, processor, args
        self.exit_stack = ExitStack()

    def __enter__(self) -> "FrozenVisualEncoder":
        encoder = self.model.visual_encoder
        self.exit_stack.enter_context(gathered_parameters(encoder))
        if next(encoder.parameters()).device != self.args.device:
            encoder.to(self.args.device)
        encoder.eval()
        return self

    def __exit__(self, *error: Any) -> None:
        self.exit_stack.close()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features on the CPU: `(views, 3 * encoders, height, width)` before `normalise` -> `(views, P, V)`."""
        args = self.args
        half = torch.bfloat16 if args.bf16 else torch.float16
        mixed = (args.bf16 or args.fp16) and args.deepspeed is None  # DeepSpeed's models are in it as a whole
        with torch.autocast(args.device.type, half, enabled=mixed):
            return self.model.encode_images(self.processor.normalise(pixels.to(args.device))).cpu()

    def form(self) -> FeatureFormat:
        """What features of a view are."""
        pixels, _ = make_image_views(self.processor, make_blank_image(self.processor), SQUARE_VIEW)
        return FeatureFormat.of(self(pixels))

    def digest(self) -> str:
        """A name for all that features depend on besides the picture."""
        model, processor, args = self.model, self.processor, self.args
        configs = [getattr(model.config, name).to_diff_dict() for name in model.config.encoder_names]
        steps = [one.to_dict() for one in processor.image_processors], processor.image_mode, processor.anyres
        precision = str(model.visual_encoder.dtype), args.bf16, args.fp16, args.deepspeed is None
        return json_digest(
            weights_digests(model.visual_encoder), configs, model.config.feature_selections, steps, precision,
            code_digest(type(self)), inspect.getsource(make_blank_image),
        )  # fmt: skip


@contextmanager
def gathered_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Within, a module's weights are whole, also where ZeRO-3 shares them out."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # takes seconds

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


class RequestedImages(Dataset[Any]):
    """Pictures as the encoder reads them, those of a record together.

    Args:
        processor: the model's.
        sources: of all records.
        requests: the pictures.
        request_groups: of each item, which requests it is.
    """

    def __init__(
        self, processor: Any, sources: Sequence[Source], requests: Sequence[FeatureRequest], request_groups: Sequence[list[int]]
    ):  # fmt: skip
        self.processor, self.sources, self.requests, self.request_groups = processor, sources, requests, request_groups

    def __len__(self) -> int:
        return len(self.request_groups)

    def __getitem__(self, index: int) -> list[tuple[int, Any]]:
        """Number, and views and size of each picture, or a `BadSample`."""
        numbers = self.request_groups[index]
        first = self.requests[numbers[0]]
        if first.source == BLANK_SOURCE:
            return [
                (numbers[0], make_image_views(self.processor, make_blank_image(self.processor, first.size), first.kind))
            ]
        sample = self.sources[first.source].sample(first.record)
        opened = open_requested_images(sample, [self.requests[number].place for number in numbers], self.processor)
        return [
            (
                number,
                one
                if isinstance(one, BadSample)
                else make_image_views(self.processor, one, self.requests[number].kind),
            )
            for number, one in zip(numbers, opened, strict=True)
        ]


def open_requested_images(sample: Sample, places: Sequence[int], processor: Any) -> list[Any]:
    """Some pictures of a sample, decoded; a `BadSample` for each that does not open."""
    if len(places) == len(sample.images):
        try:
            return decode_sample_images(sample, processor)
        except BadSample:
            pass  # which ones, is found out one by one
    found: list[Any] = []
    for place in places:
        try:
            found.append(open_image(sample.images[place], sample.id))
        except BadSample as error:
            found.append(error)
    return found


def make_image_views(processor: Any, picture: Any, kind: str) -> tuple[Tensor, tuple[int, int]]:
    """What the encoder reads of a picture that is seen in some way, before `normalise`, and its height and width."""
    if processor.tiling is None:
        return processor.image_inputs([picture])["pixel_values"], upright_size(picture)
    if kind == FRAME_VIEW:
        inputs = processor.image_inputs([picture], [None])
    elif kind == SQUARE_VIEW:  # as one of several it has no tiles
        inputs = {name: value[:1] for name, value in processor.image_inputs([picture, picture]).items()}
    else:
        inputs = processor.image_inputs([picture])
    return inputs["pixel_values"], tuple(inputs["image_sizes"][0].tolist())
