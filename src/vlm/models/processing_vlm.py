"""The processor: the one place where conversations become tokens and images become pixels.

Hub code: imports torch, Pillow, transformers and its siblings only. It is saved with the checkpoint, so training,
inference, evaluation and other people's programs all read the same ids.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import islice, repeat
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .anyres import AnyRes, Size
from .image_inputs import make_native_inputs, make_tiled_inputs
from .native import NativeResolution
from .pixels import (
    ALPHA_BACKGROUNDS,
    ImageOrTensor,
    ImageProcessor,
    Settings,
    as_rgb,
    as_tensor,
    is_plain,
    load_images,
    make_image_processor,
    make_raw_pixels,
    normalise_pixels,
)
from .processing_messages import (
    FIXED_CLOCK,
    FIXED_DATE,
    MediaMismatchError,
    break_spelled,
    flatten_content,
    images_in_conversation,
    join_spelled,
    thinks,
)
from .text_pieces import TextSplitter
from .text_processing import bounded_template, encode_text, read_prepend_scheme, special_token_pattern

IMAGE_MODES = ("square", "pad", "native")


class VLMProcessor(ProcessorMixin):
    """Tokenizer and image processors of a composed model.

    Args:
        image_processor: the visual encoder's; of several encoders, the first one's.
        tokenizer: the language model's; a fast one, since supervision is found by character offsets.
        chat_template: the Jinja template of conversations.
        image_token: the placeholder; `<image>` in a rendered conversation.
        image_start: a token before each image, or None.
        image_end: a token after each image, or None.
        tokens_per_image: placeholders that one image takes; the model's own count.
        image_mode: `square` (resized as the image processor does), `pad` (to a square in its mean colour first) or
            `native` (each image in its own size and aspect ratio, see `native.py`).
        own_template: the language model's own template, kept for a later stage that uses it again.
        anyres: the fields of `anyres.AnyRes`, where images are cut into tiles; None where each is one square.
        native: the fields of `native.NativeResolution` with `image_mode=native`; else None.
        beside: the image processors of further visual encoders, or what their `to_dict` returned.
        alpha_background: what shows through transparent images, a name of `pixels.ALPHA_BACKGROUNDS`.
        coordinates: the convention in which boxes and points are written; None: none was chosen.

    Raises:
        ValueError: the image mode or the background is unknown, or the tokenizer is missing or not a fast one.
    """

    _auto_class = "AutoProcessor"
    per_sample_inputs = ()
    """Image inputs with one row for each sample: none, all have one for each image."""
    concatenation_dims: Mapping[str, int] = MappingProxyType({})
    """Image inputs that are concatenated along another dimension than the first one: none."""
    row_indices: Mapping[str, tuple[str, int]] = MappingProxyType({})
    """Image inputs that are indices of rows of other inputs: none."""
    sees_media_together = False
    per_token_inputs = ()
    """Inputs with one value for each token, besides ids and mask: none."""
    videos = video_token = video_token_id = None
    """No token stands for a video: its frames are images."""
    encodes_videos_separately = False
    image_processor: ImageProcessor
    chat_template: str | None  # pyright: ignore[reportIncompatibleVariableOverride] - several by name are not used

    def __init__(
        self,
        image_processor: ImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start: str | None = None,
        image_end: str | None = None,
        tokens_per_image: int = 1,
        image_mode: str = "square",
        own_template: str | None = None,
        anyres: Settings | None = None,
        native: Settings | None = None,
        beside: Sequence[ImageProcessor | Settings] = (),
        alpha_background: str = "white",
        coordinates: str | None = None,
        **kwargs: object,
    ):
        if image_mode not in IMAGE_MODES:
            raise ValueError(f"dataset.image_mode={image_mode}: allowed are {', '.join(IMAGE_MODES)}")
        if (image_mode == "native") != (native is not None):
            raise ValueError(
                f"image_mode={image_mode} with native={native}: native is given with image_mode=native alone"
            )
        if alpha_background not in ALPHA_BACKGROUNDS:
            allowed = ", ".join(ALPHA_BACKGROUNDS)
            raise ValueError(f"dataset.alpha_background={alpha_background}: allowed are {allowed}")
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError("VLMProcessor needs a fast tokenizer: supervision is found by character offsets")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_start = image_start
        self.image_end = image_end
        self.tokens_per_image = tokens_per_image
        self.image_mode = image_mode
        self.alpha_background = alpha_background
        self.use_coordinates(coordinates)
        self.own_template = own_template
        self.anyres = anyres
        self.native = native
        self.beside = [make_image_processor(settings) for settings in beside]
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(image_token)
        self.special_tokens = special_token_pattern(tokenizer, image_token)
        self.prepend_scheme = read_prepend_scheme(tokenizer)
        self.splitter = TextSplitter(tokenizer, image_token, self.special_tokens, self.prepend_scheme)
        if (legacy := getattr(tokenizer, "legacy", None)) is not None:
            tokenizer.init_kwargs["legacy"] = legacy  # transformers would not save it, and give other ids from then on

    @property
    def image_processors(self) -> list[ImageProcessor]:
        """The image processors of all visual encoders, in the order of their channels."""
        return [self.image_processor, *self.beside]

    def to_dict(self) -> Settings:
        """Return the settings, with those of the image processors of further encoders."""
        return {**super().to_dict(), "beside": [image_processor.to_dict() for image_processor in self.beside]}

    def as_rgb(self, image: Image.Image) -> Image.Image:
        """Return an image as the visual encoders see it before it is resized: upright, in RGB, without transparency."""
        return as_rgb(image, self.alpha_background)

    def use_coordinates(self, name: str | None, tokens: re.Pattern[str] | None = None) -> None:
        """Set the convention of coordinates and what matches its tokens, which are tokens in users' texts, too."""
        self.coordinates, self.coordinate_tokens = name, tokens

    @property
    def tiling(self) -> AnyRes | None:
        """How images are cut into tiles; None where each is one square."""
        return None if self.anyres is None else AnyRes(**self.anyres)

    @property
    def native_resolution(self) -> NativeResolution | None:
        """How large images are at native resolution; None where all have one size."""
        return None if self.native is None else NativeResolution(**self.native)

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the number of tokens of an image depends on its size."""
        return self.anyres is not None or self.native is not None

    @property
    def deduplicated_inputs(self) -> tuple[str, ...]:
        """Image inputs in which equal images may stand once: the model reads `image_index` with them."""
        return () if self.native is not None else ("pixel_values", "image_features")

    @property
    def pools_video_frames(self) -> bool:
        """Whether frames of videos are encoded otherwise than images; their sizes are then None."""
        return self.anyres is not None

    def image_token_ids(self, num_tokens: int | None = None) -> list[int]:
        """Return the ids of one image in a conversation: start, placeholders (by default those of one view), end."""
        start, end = (
            self.tokenizer.convert_tokens_to_ids([token] if token else [])
            for token in (self.image_start, self.image_end)
        )
        return start + [self.image_token_id] * (self.tokens_per_image if num_tokens is None else num_tokens) + end

    def tokenize(
        self, text: str, user_spans: Sequence[tuple[int, int]] = (), sizes: Sequence[Size | None] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a rendered conversation, and the character span that each id comes from.

        The text between two images is tokenised by itself, and so is the text after a leading BOS token, as in
        LLaVA. A SentencePiece tokenizer puts the start of a word before such a text, also before one that begins with a
        blank. A special token that a user spelled within one of `user_spans` is read as plain text.

        Args:
            text: a rendered conversation; each `image_token` outside `user_spans` stands for one image.
            user_spans: character spans that users wrote, in order.
            sizes: height and width of each image, in order, None for a frame of a video; read only where
                `needs_image_sizes`.

        Raises:
            MediaMismatchError: the text has more or fewer image tokens than there are sizes, where `needs_image_sizes`.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        pieces = self.splitter.split(text, user_spans, self.coordinate_tokens)
        counts = repeat(self.tokens_per_image)
        if self.needs_image_sizes:
            number = sum(text[start:end] == self.image_token for start, end, _ in pieces)
            if number != len(sizes):
                given = f"{len(sizes)} sizes of images given"
                raise MediaMismatchError(f"{given}, but the text has {number} {self.image_token}")
            counts = iter(self._count_tokens(sizes))
        for start, end, continues_text in pieces:
            piece = text[start:end]
            if piece == self.image_token:
                new = self.image_token_ids(next(counts))
                ids += new
                spans += [(start, end)] * len(new)
            else:
                lead = self.splitter.lead(piece, continues_text)
                new, offsets = encode_text(self.tokenizer, lead + piece)
                ids += new[continues_text:]
                if lead or (0, 0) in offsets:
                    origin = start - len(lead)
                    spans += [(max(origin + a, start), max(origin + b, start + 1)) for a, b in offsets[continues_text:]]
                else:
                    spans += [(start + a, start + b) for a, b in offsets] if start else offsets
        return ids, spans

    def _count_tokens(self, sizes: Sequence[Size | None]) -> list[int]:
        """Return the number of tokens of each image of a sample, where it depends on their sizes."""
        if (native := self.native_resolution) is not None:
            return native.image_tokens([size for size in sizes if size is not None])  # frames of videos have sizes too
        assert self.tiling is not None
        return self.tiling.image_tokens(sizes)

    def image_inputs(self, images: Sequence[ImageOrTensor], sizes: Sequence[Size | None] = ()) -> dict[str, Tensor]:
        """Return the model's inputs for a sample's images, before `normalise`; empty without any.

        Args:
            images: Pillow images, or, where `accepts_tensors`, uint8 tensors `(3, height, width)`.
            sizes: None for each image that is a frame of a video, as in `tokenize`; without sizes, none is a frame.

        Returns:
            `pixel_values` as `raw_pixels` returns them; where images are cut into tiles, those of all views, with
            `image_sizes` `(images, 2)`, height and width in pixels, and `image_views` `(images,)`, how many each has;
            at native resolution, those of `make_native_inputs`.
        """
        if not images:
            return {}
        tiling, native = self.tiling, self.native_resolution
        if tiling is None and native is None:
            return {"pixel_values": self.raw_pixels(images)}
        rgb_images = [image if isinstance(image, Tensor) else as_tensor(self.as_rgb(image)) for image in images]
        if native is not None:
            return make_native_inputs(self.image_processor, native, rgb_images)
        assert tiling is not None
        return make_tiled_inputs(self.image_processors, tiling, rgb_images, sizes)

    def text_inputs(self, ids: Sequence[int], labels: Sequence[int], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs named in `per_token_inputs`: none."""
        return {}

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pixels as the visual encoders read them: `(images, 3 * encoders, height, width)`.

        At native resolution they are patches, `(patches, 3, side, side)`.
        """
        return self.normalise(self.image_inputs(images)["pixel_values"] if self.native else self.raw_pixels(images))

    @property
    def accepts_tensors(self) -> bool:
        """Whether `raw_pixels` takes decoded images as tensors too."""
        return all(map(is_plain, self.image_processors))

    def raw_pixels(self, images: Sequence[ImageOrTensor]) -> Tensor:
        """Return pixels before `normalise`, as data workers pass them on: `(images, 3 * encoders, height, width)`.

        They are uint8, a quarter of the bytes, where the image processors have only rescaling and normalising left
        to do; otherwise they are already what `normalise` returns.

        Args:
            images: Pillow images, or, where `accepts_tensors`, uint8 tensors `(3, height, width)`.
        """
        rgb_images = [image if isinstance(image, Tensor) else self.as_rgb(image) for image in images]
        processors = self.image_processors
        pixels = [make_raw_pixels(processor, rgb_images, self.image_mode) for processor in processors]
        if not self.accepts_tensors:
            pixels = list(map(normalise_pixels, processors, pixels))
        return torch.cat(pixels, dim=1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the pixels of `raw_pixels` as the visual encoders read them, on the device where they are."""
        channels = pixels.chunk(len(self.image_processors), dim=1)
        return torch.cat(list(map(normalise_pixels, self.image_processors, channels)), dim=1)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: object,
    ) -> BatchFeature:
        """Turn rendered conversations and their images into model inputs.

        Args:
            images: paths, URLs, base64 texts, arrays or Pillow images, in one or nested lists, in order.
            text: one conversation or several, with an image token for each image.
            padding_side: `left` or `right`.
            return_tensors: as the tokenizer takes it.
            kwargs: not used.

        Returns:
            `input_ids` and `attention_mask` of shape `(texts, tokens)`, padded on the left for generation, and
            `pixel_values` of shape `(images, 3 * encoders, height, width)`. Where images are cut into tiles,
            `pixel_values` holds the views of all images, and `image_sizes` and `image_views` tell whose each is; the
            images of one text are one sample, and without text each image is a sample. At native resolution,
            `pixel_values` holds the patches of all images, and `image_grids` their rows and columns.

        Raises:
            ValueError: the texts have more or fewer image tokens than there are images.
        """
        rgb_images = [self.as_rgb(rgb_image) for rgb_image in ([] if images is None else load_images(images))]
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        num_images = [1] * len(rgb_images) if texts is None else [text.count(self.image_token) for text in texts]
        if sum(num_images) != len(rgb_images):
            raise ValueError(f"{len(rgb_images)} images given, but the text has {sum(num_images)} {self.image_token}")
        remaining = iter(rgb_images)
        samples = [list(islice(remaining, number)) for number in num_images]
        inputs = [self.image_inputs(sample) for sample in samples if sample]
        data = {name: torch.cat([sample[name] for sample in inputs]) for name in (inputs or [{}])[0]}
        if inputs:
            data["pixel_values"] = self.normalise(data["pixel_values"])
        if texts is not None:
            encoded = []
            for rendered, sample in zip(texts, samples, strict=True):
                sizes = [(image.height, image.width) for image in sample]
                encoded.append({"input_ids": self.tokenize(*join_spelled(rendered, self.image_token), sizes)[0]})
            data |= self.tokenizer.pad(encoded, padding_side=padding_side, return_tensors=return_tensors)
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render conversations; contents may be strings or lists of text and image items, for any template.

        Args:
            conversation: the messages of one conversation, or a list of conversations.
            args: passed on to the tokenizer.
            kwargs: `tokenize` (default False), `return_dict`, `chat_template`, and the template's own variables. With
                `tokenize`, an image token that a text item spells is plain text.

        Returns:
            The text, or texts; with `tokenize` the `input_ids`, with `return_dict` too all that `__call__` returns.
        """
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        return_dict = kwargs.pop("return_dict", False)
        kwargs.pop("return_tensors", None)
        if kwargs.pop("tokenize", False):
            images = [image for turns in conversations for image in images_in_conversation(turns)]
            broken = [[break_spelled(turn, self.image_token) for turn in turns] for turns in conversations]
            text = self.apply_chat_template(broken if is_batch else broken[0], *args, **kwargs)
            inputs = self(images=images or None, text=text, **kwargs.get("processor_kwargs", {}))
            return inputs if return_dict else inputs["input_ids"]
        flat = [
            [{**turn, "content": flatten_content(turn["content"], self.image_token)} for turn in turns]
            for turns in conversations
        ]
        template = kwargs.pop("chat_template", self.chat_template)
        if template and "strftime_now" in template:
            template = FIXED_CLOCK + template
        kwargs["enable_thinking"] = thinks(self.tokenizer, kwargs.get("enable_thinking"))
        settings = {"date_string": FIXED_DATE, "image_token": self.image_token, **kwargs}
        settings |= {"tokenize": False, "chat_template": template}
        with bounded_template():
            rendered = self.tokenizer.apply_chat_template(flat, *args, **settings)
        return rendered if is_batch else rendered[0]

    @property
    def model_input_names(self) -> list[str]:
        """The names of the inputs that `__call__` returns."""
        names = ["input_ids", "attention_mask", "pixel_values"]
        names += ["image_grids"] if self.native is not None else []
        return names if self.anyres is None else [*names, "image_sizes", "image_views"]
