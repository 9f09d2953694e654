"""The processor: the one place where conversations become tokens and pictures become pixels.

Hub code: imports torch, Pillow and transformers only. It travels with the checkpoint, so training, inference,
evaluation and other people's programs all read the same ids.
"""

import re
from collections.abc import Sequence
from itertools import islice, pairwise, repeat
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .anyres import AnyRes, Size
from .pixels import (
    as_rgb,
    as_tensor,
    is_plain,
    load_images,
    make_image_processor,
    make_raw_pixels,
    make_views,
    normalise_pixels,
)

IMAGE_MODES = ("square", "pad")
FIXED_DATE = "26 Jul 2024"
"""Given to templates that would write today's date (Llama-3.2), so that a prompt is the same every day."""
FIXED_CLOCK = f"{{% macro strftime_now(format) %}}{FIXED_DATE}{{% endmacro +%}}"
"""Stands before templates that ask what day it is: transformers hands them its own clock, and no function of ours."""


class VLMProcessor(ProcessorMixin):
    """Tokenizer and image processors of a composed model.

    Args:
        image_processor: the visual encoder's; of several, the first one's.
        tokenizer: the language model's; a fast one, since supervision is found by character offsets.
        chat_template: the Jinja template of conversations.
        image_token: the placeholder; `<image>` in a rendered conversation.
        image_start: a token before each image, or None.
        image_end: a token after each image, or None.
        tokens_per_image: placeholders that one image takes; the model's own count.
        own_template: the language model's own template, kept for a stage that wants it after one that did not.
        anyres: the fields of `anyres.AnyRes`, where pictures are seen in tiles; None: each is one square.
        image_mode: `square` (as the image processor does it) or `pad` (to a square in its mean colour first).
        beside: the image processors of further visual encoders, or what their `to_dict` gave.
    """

    _auto_class = "AutoProcessor"
    per_sample_inputs = ()
    """Inputs of images that have one row for each sample: none, all have one for each image."""
    per_token_inputs = ()
    """Inputs with one value for each token, besides ids and mask: none."""
    video_token = None
    video_token_id = None
    """No token stands for a video: its frames are pictures."""

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
        anyres: dict[str, Any] | None = None,
        beside: Sequence[Any] = (),
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
        self.anyres = anyres
        self.beside = [make_image_processor(one) for one in beside]
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = re.compile(
            "|".join(map(re.escape, sorted(special | {image_token}, key=len, reverse=True)))
        )

    @property
    def image_processors(self) -> list[Any]:
        """Of all visual encoders, in the order of their channels."""
        return [self.image_processor, *self.beside]

    def to_dict(self) -> dict[str, Any]:
        """As usual, with the image processors of further encoders."""
        return {**super().to_dict(), "beside": [one.to_dict() for one in self.beside]}

    @property
    def tiling(self) -> AnyRes | None:
        """How pictures are seen in tiles; None: each is one square."""
        return None if self.anyres is None else AnyRes(**self.anyres)

    @property
    def needs_image_sizes(self) -> bool:
        """Whether an image's tokens depend on how large it is."""
        return self.anyres is not None

    @property
    def pools_video_frames(self) -> bool:
        """Whether frames of videos are seen as other pictures are not; their sizes are then None."""
        return self.anyres is not None

    def image_token_ids(self, num_tokens: int | None = None) -> list[int]:
        """The ids that one image takes in a conversation, its start and end token included.

        Args:
            num_tokens: placeholders; None: those of one view.
        """
        around: list[Any] = [[token] if token else [] for token in (self.image_start, self.image_end)]
        start, end = map(self.tokenizer.convert_tokens_to_ids, around)
        return start + [self.image_token_id] * (self.tokens_per_image if num_tokens is None else num_tokens) + end

    def tokenize(
        self, text: str, user_spans: Sequence[tuple[int, int]] = (), sizes: Sequence[Size | None] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered conversation, and the character span that each came from.

        The text between two images is tokenised on its own, and so is what follows a leading BOS token, as LLaVA
        does. A special token that somebody spelled within a `user_spans` span is read as plain text.

        Args:
            text: a rendered conversation; each `image_token` outside `user_spans` stands for one image.
            user_spans: character spans that people wrote, in order.
            sizes: height and width of each image, in order, None for a frame of a video; only looked at where
                `needs_image_sizes`.

        Raises:
            ValueError: the text has more or fewer image tokens than there are sizes, where `needs_image_sizes`.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        pieces = self._split_text(text, user_spans)
        if (tiling := self.tiling) is not None:
            wanted = sum(text[start:end] == self.image_token for start, end, _ in pieces)
            if wanted != len(sizes):
                raise ValueError(f"{len(sizes)} sizes of images given, but the text has {wanted} {self.image_token}")
            counts = iter(tiling.image_tokens(sizes))
        else:
            counts = repeat(self.tokens_per_image)
        for start, end, continues_text in pieces:
            piece = text[start:end]
            if piece == self.image_token:
                new = self.image_token_ids(next(counts))
                ids += new
                spans += [(start, end)] * len(new)
            else:
                lead = (
                    self.image_token if continues_text else ""
                )  # behind a token, no tokenizer begins a word of its own
                encoded = self.tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
                origin = start - len(lead)
                ids += encoded["input_ids"][continues_text:]
                spans += [(origin + a, origin + b) for a, b in encoded["offset_mapping"][continues_text:]]
        return ids, spans

    def _split_text(self, text: str, user_spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """Cut `text` at images, after its BOS and within spelled special tokens: (start, end, whether text goes on)."""
        starts = [(0, False)]
        for match in self.special_tokens.finditer(text):
            start, end = match.span()
            if any(a <= start and end <= b for a, b in user_spans):
                starts.append((start + 1, True))  # neither half is a special token
            elif match.group() == self.image_token:
                starts += [(start, False), (end, False)]
            elif start == 0 and match.group() == self.tokenizer.bos_token:
                starts.append((end, False))
        pairs = pairwise([*starts, (len(text), False)])
        return [(start, end, continues_text) for (start, continues_text), (end, _) in pairs if start < end]

    def image_inputs(
        self, images: Sequence[Image.Image | torch.Tensor], sizes: Sequence[Size | None] = ()
    ) -> dict[str, torch.Tensor]:
        """What the model reads of a sample's images, before `normalise`; nothing where it has none.

        Args:
            images: Pillow's, or, where `accepts_tensors`, whole numbers `(3, height, width)`.
            sizes: None for each that is a frame of a video, as in `tokenize`; where nothing is given, none is.
        """
        if not images:
            return {}
        if (tiling := self.tiling) is None:
            return {"pixel_values": self.raw_pixels(images)}
        rgb_images = [image if isinstance(image, torch.Tensor) else as_tensor(as_rgb(image)) for image in images]
        own: list[Size] = [(rgb_image.shape[1], rgb_image.shape[2]) for rgb_image in rgb_images]
        frames = [size is None for size in sizes] or [False] * len(images)
        views = tiling.num_views([None if frame else size for frame, size in zip(frames, own, strict=True)])
        pixels = [
            torch.cat(
                [make_views(image_processor, tiling, rgb_image, number) for image_processor in self.image_processors],
                dim=1,
            )
            for rgb_image, number in zip(rgb_images, views, strict=True)
        ]
        return {
            "pixel_values": torch.cat(pixels),
            "image_sizes": torch.tensor(own),
            "image_views": torch.tensor(views),
        }

    def text_inputs(
        self, ids: Sequence[int], labels: Sequence[int], images: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the model reads for each token besides its id; see `per_token_inputs`."""
        return {}

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels as the visual encoders read them: `(images, 3 * encoders, height, width)`."""
        return self.normalise(self.raw_pixels(images))

    @property
    def accepts_tensors(self) -> bool:
        """Whether `raw_pixels` takes decoded pictures as tensors too."""
        return all(map(is_plain, self.image_processors))

    def raw_pixels(self, images: Sequence[Image.Image | torch.Tensor]) -> torch.Tensor:
        """Pixels before `normalise`, as data workers hand them on: `(images, 3 * encoders, height, width)`.

        Whole numbers from 0 to 255 where all that the image processors have left to do is to rescale and normalise: a
        quarter of the bytes. Else they are what `normalise` returns.

        Args:
            images: Pillow's, or, where `accepts_tensors`, whole numbers `(3, height, width)`.
        """
        rgb_images = [image if isinstance(image, torch.Tensor) else as_rgb(image) for image in images]
        seen = [
            make_raw_pixels(image_processor, rgb_images, self.image_mode) for image_processor in self.image_processors
        ]
        if not self.accepts_tensors:
            seen = [
                normalise_pixels(image_processor, pixels)
                for image_processor, pixels in zip(self.image_processors, seen, strict=True)
            ]
        return torch.cat(seen, dim=1)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `raw_pixels` gave as the visual encoders read it, on the device where it is."""
        seen = pixels.chunk(len(self.image_processors), dim=1)
        return torch.cat([normalise_pixels(*one) for one in zip(self.image_processors, seen, strict=True)], dim=1)

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
            `pixel_values` of shape `(images, 3 * encoders, height, width)`. Where pictures are seen in tiles,
            `pixel_values` are the views of all of them, and `image_sizes` and `image_views` say whose they are; the
            pictures of one text are a sample, and without text each is one by itself.

        Raises:
            ValueError: the texts have more or fewer image tokens than there are images.
        """
        rgb_images = [as_rgb(rgb_image) for rgb_image in ([] if images is None else load_images(images))]
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        slots = [1] * len(rgb_images) if texts is None else [one.count(self.image_token) for one in texts]
        if sum(slots) != len(rgb_images):
            raise ValueError(f"{len(rgb_images)} images given, but the text has {sum(slots)} {self.image_token}")
        waiting = iter(rgb_images)
        samples = [list(islice(waiting, number)) for number in slots]
        inputs = [self.image_inputs(sample) for sample in samples if sample]
        data: dict[str, Any] = {name: torch.cat([one[name] for one in inputs]) for name in (inputs or [{}])[0]}
        if inputs:
            data["pixel_values"] = self.normalise(data["pixel_values"])
        if texts is not None:
            sizes = [[(rgb_image.height, rgb_image.width) for rgb_image in sample] for sample in samples]
            encoded = [{"input_ids": self.tokenize(one, (), seen)[0]} for one, seen in zip(texts, sizes, strict=True)]
            data |= self.tokenizer.pad(encoded, padding_side=padding_side, return_tensors=return_tensors)
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As usual; contents may be strings or lists of text and image items, whatever the template reads."""
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if many else [conversation]
        if kwargs.pop("tokenize", False):
            images = [item for talk in conversations for item in images_in_conversation(talk)]
            text = self.apply_chat_template(
                conversation, *args, **{k: v for k, v in kwargs.items() if k not in ("return_dict", "return_tensors")}
            )
            inputs = self(images=images or None, text=text, **kwargs.get("processor_kwargs", {}))
            return inputs if kwargs.get("return_dict") else inputs["input_ids"]
        flat = [[{**turn, "content": self._flatten(turn["content"])} for turn in talk] for talk in conversations]
        frozen = {"date_string": FIXED_DATE, "enable_thinking": False, "image_token": self.image_token}
        template = kwargs.pop("chat_template", self.chat_template)
        if template and "strftime_now" in template:
            template = FIXED_CLOCK + template
        rendered = self.tokenizer.apply_chat_template(
            flat, *args, tokenize=False, chat_template=template,
            **{**frozen, **{k: v for k, v in kwargs.items() if k not in ("return_dict", "return_tensors")}},
        )  # fmt: skip
        return rendered if many else rendered[0]

    def _flatten(self, content: str | list[dict[str, Any]]) -> str:
        """A content list as one string, an image token for each image.

        Those before a text stand on a line of their own, as in LLaVA's records.
        """
        if isinstance(content, str):
            return content
        text, leads = "", True
        for item in content:
            if item["type"] == "text":
                text += "\n" if leads and text and not item["text"].startswith("\n") else ""
                text += item["text"]
                leads = False
            else:
                text += self.image_token
        return text

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        names = ["input_ids", "attention_mask", "pixel_values"]
        return names if self.anyres is None else [*names, "image_sizes", "image_views"]


def images_in_conversation(conversation: Sequence[dict[str, Any]]) -> list[Any]:
    """The pictures (objects, paths, addresses) that a conversation's content lists name, in order.

    Items are `{"type": "image", "image": …}` (or `path`, `url`, `base64`), or OpenAI's `{"type": "image_url",
    "image_url": {"url": …}}`.
    """
    items = [item for turn in conversation if not isinstance(turn["content"], str) for item in turn["content"]]
    return [_image_from_item(item) for item in items if item["type"] in ("image", "image_url")]


def _image_from_item(item: dict[str, Any]) -> Any:
    if item["type"] == "image_url":
        named = item["image_url"]
        return named["url"] if isinstance(named, dict) else named
    return next(item[key] for key in ("image", "path", "url", "base64") if key in item)
