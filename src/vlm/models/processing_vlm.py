"""The processor: the one place where conversations become tokens and pictures become pixels.

Hub code: imports torch, Pillow and transformers only. It travels with the checkpoint, so training, inference,
evaluation and other people's programs all read the same ids.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

IMAGE_MODES = ("square", "pad")
FROZEN_DATE = "26 Jul 2024"
"""Given to templates that would write today's date (Llama-3.2), so that a prompt is the same every day."""
FROZEN_CLOCK = f"{{% macro strftime_now(format) %}}{FROZEN_DATE}{{% endmacro +%}}"
"""Stands before templates that ask what day it is: transformers hands them its own clock, and no function of ours."""


class VLMProcessor(ProcessorMixin):
    """Tokenizer and image processor of a composed model.

    Args:
        image_processor: the visual encoder's.
        tokenizer: the language model's; a fast one, since supervision is found by character offsets.
        chat_template: the Jinja template of conversations.
        image_token: the placeholder; `<image>` in a rendered conversation.
        image_start: a token before each image, or None.
        image_end: a token after each image, or None.
        tokens_per_image: placeholders that one image takes; the model's own count.
        own_template: the language model's own template, kept for a stage that wants it after one that did not.
        image_mode: `square` (as the image processor does it) or `pad` (to a square in its mean colour first).
    """

    _auto_class = "AutoProcessor"
    row_inputs = ()
    """Inputs of images that have one row for each sample: none, all have one for each image."""
    token_inputs = ()
    """Inputs with one value for each token, besides ids and mask: none."""
    needs_sizes = False
    """Whether an image's tokens depend on how large it is."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start: str | None = None,
        image_end: str | None = None,
        tokens_per_image: int = 1,
        image_mode: str = "square",
        own_template: str | None = None,
        **kwargs: Any,
    ):
        if image_mode not in IMAGE_MODES:
            raise ValueError(f"dataset.image_mode={image_mode}: allowed are {', '.join(IMAGE_MODES)}")
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError("VLMProcessor needs a fast tokenizer: supervision is found by character offsets")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_start = image_start
        self.image_end = image_end
        self.tokens_per_image = tokens_per_image
        self.image_mode = image_mode
        self.own_template = own_template
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = re.compile(
            "|".join(map(re.escape, sorted(special | {image_token}, key=len, reverse=True)))
        )

    def image_ids(self) -> list[int]:
        """The ids that one image takes in a conversation, its start and end token included."""
        around: list[Any] = [[token] if token else [] for token in (self.image_start, self.image_end)]
        start, end = map(self.tokenizer.convert_tokens_to_ids, around)
        return start + [self.image_token_id] * self.tokens_per_image + end

    def tokenize(
        self, text: str, spoken: Sequence[tuple[int, int]] = (), sizes: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered conversation, and the character span that each came from.

        The text between two images is tokenised on its own, and so is what follows a leading BOS token, as LLaVA
        does. A special token that somebody spelled within a `spoken` span is read as plain text.

        Args:
            text: a rendered conversation; each `image_token` outside `spoken` stands for one image.
            spoken: character spans that people wrote, in order.
            sizes: height and width of each image, in order; only looked at where `needs_sizes`.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, end, goes_on in self._pieces(text, spoken):
            piece = text[start:end]
            if piece == self.image_token:
                new = self.image_ids()
                ids += new
                spans += [(start, end)] * len(new)
            else:
                lead = self.image_token if goes_on else ""  # behind a token, no tokenizer begins a word of its own
                encoded = self.tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
                origin = start - len(lead)
                ids += encoded["input_ids"][goes_on:]
                spans += [(origin + a, origin + b) for a, b in encoded["offset_mapping"][goes_on:]]
        return ids, spans

    def _pieces(self, text: str, spoken: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """Cut `text` at images, after its BOS and within spelled special tokens: (start, end, whether text goes on)."""
        starts = [(0, False)]
        for match in self.special_tokens.finditer(text):
            start, end = match.span()
            if any(a <= start and end <= b for a, b in spoken):
                starts.append((start + 1, True))  # neither half is a special token
            elif match.group() == self.image_token:
                starts += [(start, False), (end, False)]
            elif start == 0 and match.group() == self.tokenizer.bos_token:
                starts.append((end, False))
        pairs = pairwise([*starts, (len(text), False)])
        return [(start, end, goes_on) for (start, goes_on), (end, _) in pairs if start < end]

    def image_inputs(self, images: Sequence[Image.Image | torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model reads of a sample's images, before `normalise`; nothing where it has none."""
        return {"pixel_values": self.raw_pixels(images)} if images else {}

    def text_inputs(self, ids: Sequence[int], images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model reads for each token besides its id; see `token_inputs`."""
        return {}

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels as the visual encoder reads them: `(images, 3, height, width)`."""
        return self.normalise(self.raw_pixels(images))

    @property
    def reads_tensors(self) -> bool:
        """Whether `raw_pixels` takes decoded pictures as tensors too."""
        return is_plain(self.image_processor)

    def raw_pixels(self, images: Sequence[Image.Image | torch.Tensor]) -> torch.Tensor:
        """Pixels before `normalise`, as data workers hand them on: `(images, 3, height, width)`.

        Whole numbers from 0 to 255 where all that the image processor has left to do is to rescale and normalise: a
        quarter of the bytes. Else they are what `normalise` returns.

        Args:
            images: Pillow's, or, where `reads_tensors`, whole numbers `(3, height, width)`.
        """
        pictures = [image if isinstance(image, torch.Tensor) else as_rgb(image) for image in images]
        if self.image_mode == "pad":
            colour = tuple(int(mean * 255) for mean in self.image_processor.image_mean)
            pictures = [pad_to_square(picture, colour) for picture in pictures]
        if not is_plain(self.image_processor):
            return self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return torch.stack([self._resized(picture) for picture in pictures])

    def _resized(self, picture: Image.Image | torch.Tensor) -> torch.Tensor:
        """The image processor's own resizing and cropping, without what its call does around them."""
        steps = self.image_processor
        # (3, height, width), but pixel by pixel in memory, as Pillow has it: torchvision resizes that fastest.
        pixels = picture if isinstance(picture, torch.Tensor) else torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if steps.do_resize:
            pixels = steps.resize(pixels, steps.size, resample=steps.resample)
        if steps.do_center_crop:
            pixels = steps.center_crop(pixels, steps.crop_size)
        return pixels

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `raw_pixels` gave as the visual encoder reads it, on the device where it is."""
        if pixels.dtype != torch.uint8:
            return pixels
        steps = self.image_processor
        mean, std = tuple(steps.image_mean), tuple(steps.image_std)
        return steps.rescale_and_normalize(pixels, True, steps.rescale_factor, True, mean, std)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Rendered conversations and their pictures as model inputs.

        Returns:
            `input_ids` and `attention_mask` of shape `(texts, tokens)`, padded on the left for generation, and
            `pixel_values` of shape `(images, 3, height, width)`.

        Raises:
            ValueError: the texts have more or fewer image tokens than there are images.
        """
        data: dict[str, Any] = {}
        pictures = [] if images is None else as_pictures(images)
        if pictures:
            data["pixel_values"] = self.pixel_values(pictures)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            wanted = sum(one.count(self.image_token) for one in texts)
            if wanted != len(pictures):
                raise ValueError(f"{len(pictures)} images given, but the text has {wanted} {self.image_token}")
            encoded = [{"input_ids": self.tokenize(one)[0]} for one in texts]
            data |= self.tokenizer.pad(encoded, padding_side=padding_side, return_tensors=return_tensors)
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As usual; contents may be strings or lists of text and image items, whatever the template reads."""
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if many else [conversation]
        if kwargs.pop("tokenize", False):
            images = [item for talk in conversations for item in images_of(talk)]
            text = self.apply_chat_template(
                conversation, *args, **{k: v for k, v in kwargs.items() if k not in ("return_dict", "return_tensors")}
            )
            inputs = self(images=images or None, text=text, **kwargs.get("processor_kwargs", {}))
            return inputs if kwargs.get("return_dict") else inputs["input_ids"]
        flat = [[{**turn, "content": self._flatten(turn["content"])} for turn in talk] for talk in conversations]
        frozen = {"date_string": FROZEN_DATE, "enable_thinking": False, "image_token": self.image_token}
        template = kwargs.pop("chat_template", self.chat_template)
        if template and "strftime_now" in template:
            template = FROZEN_CLOCK + template
        rendered = self.tokenizer.apply_chat_template(
            flat, *args, tokenize=False, chat_template=template,
            **{**frozen, **{k: v for k, v in kwargs.items() if k not in ("return_dict", "return_tensors")}},
        )  # fmt: skip
        return rendered if many else rendered[0]

    def _flatten(self, content: str | list[dict[str, Any]]) -> str:
        """A content list as one string, an image token for each image."""
        if isinstance(content, str):
            return content
        return "".join(item["text"] if item["type"] == "text" else self.image_token for item in content)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values"]


def images_of(conversation: Sequence[dict[str, Any]]) -> list[Any]:
    """The pictures (objects, paths, addresses) that a conversation's content lists name, in order."""
    items = [item for turn in conversation if not isinstance(turn["content"], str) for item in turn["content"]]
    keys = ("image", "path", "url", "base64")
    return [next(item[key] for key in keys if key in item) for item in items if item["type"] == "image"]


def is_plain(image_processor: Any) -> bool:
    """Whether an image processor resizes, crops, rescales and normalises, and does nothing else."""
    kind = type(image_processor)
    inherited = getattr(kind, "_preprocess", None), getattr(kind, "preprocess", None)
    modules = {getattr(method, "__module__", "").rpartition(".")[2] for method in inherited}
    return (
        modules <= {"image_processing_backends", "image_processing_utils"}
        and not getattr(image_processor, "do_pad", None)
        and bool(image_processor.do_rescale and image_processor.do_normalize)
    )


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture upright and in RGB; of 16 bits a channel, the upper 8 are kept, which Pillow would cut off at 255."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image.convert("RGB")


def pad_to_square(image: Any, colour: tuple[int, ...]) -> Any:
    """The image, Pillow's or a tensor, in the middle of a square of its longer side, as LLaVA-1.5 prepares it."""
    if isinstance(image, torch.Tensor):
        _, height, width = image.shape
        side = max(height, width)
        padded = image.new_tensor(colour).repeat(side, side, 1).permute(2, 0, 1)  # (3, side, side), pixel by pixel
        top, left = (side - height) // 2, (side - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def as_pictures(images: Any) -> list[Image.Image]:
    """Pictures as Pillow's: out of one, or lists, of paths, addresses, base64 texts, arrays and Pillow's own."""
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in as_pictures(image)]
    return [load_image(images) if isinstance(images, str) else to_pil_image(images)]
