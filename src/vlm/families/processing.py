"""A family's own processor behind the `Processor` Protocol: rendered conversations to ids, images to inputs.

Every id and every pixel is the family's own. The character span of each id is added, so that exactly the replies can
be supervised.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from vlm.data.batching.row_indices import shift_indices
from vlm.data.coordinates.table import token_pattern
from vlm.data.encoding.processor_errors import ProcessorRefusalError
from vlm.data.processor import Tools
from vlm.data.sample import Clip, MediaSize
from vlm.data.vision.images import Medium
from vlm.data.vision.video import DecodedVideo
from vlm.families.chat_template import FamilyTemplate, get_own_template, render_template
from vlm.families.derive_inputs import SIDE, WORDS, DerivedInputs, derive_inputs
from vlm.families.expanded_text import ExpandedText, expand_text
from vlm.families.native import (
    NativeProcessor,
    ProcessorMismatchError,
    find_call_form,
    find_video_text,
    image_inputs_of,
)
from vlm.families.table import Family
from vlm.families.token_inputs import MASK_OF_IMAGES
from vlm.families.token_spans import check_spans, encode_with_spans
from vlm.families.videos import FamilyVideos, joined
from vlm.models.pixels import as_rgb
from vlm.models.processing_messages import MediaMismatchError, Message
from vlm.models.text_processing import span_finder, special_token_pattern

Size = tuple[int, int]


class FamilyProcessor:
    """A `Processor` that wraps a family's own.

    Args:
        native: the family's processor.
        family: its row of the table, or one without exceptions.
        chat_template: a template to use in place of the family's own.
        inputs: what the model's inputs are like; None: found by calling `native` on blank images.

    Raises:
        ValueError: the family has no chat template, and none is given; or its processor cannot be used here, with the
            reason.
    """

    needs_image_sizes = True
    pools_video_frames = False
    accepts_tensors = False
    tiling = None

    def __init__(
        self, native: Any, family: Family, chat_template: str | None = None, inputs: DerivedInputs | None = None
    ):
        self.native = native
        self.family = family
        self.deduplicated_inputs = ()
        self.tokenizer = native.tokenizer
        if getattr(native, "image_processor", None) is None:
            raise ProcessorMismatchError(f"{family.name}: {type(native).__name__} has no image_processor")
        check_spans(self.tokenizer)
        self.image_processor = native.image_processor
        self.own_template = get_own_template(native) or family.template
        self.chat_template = chat_template or self.own_template
        if self.chat_template is None:
            raise ValueError(f"{family.name}: its processor has no chat template. Set one with dataset.template.")
        render_own = partial(render_template, self.tokenizer, self.own_template) if self.own_template else None
        self.image_token, form = find_call_form(native, render_own)
        self.calls = NativeProcessor(native, self.image_token, form if inputs is None else inputs.form)
        is_new = inputs is None
        self.inputs = inputs = inputs or derive_inputs(self.calls, family)
        self.per_sample_inputs, self.per_token_inputs = inputs.per_sample, inputs.per_token
        self.concatenation_dims, self.row_indices = inputs.dims, inputs.indices
        self.sees_media_together = family.sees_media_together
        self.videos = None
        if inputs.min_frames:
            text = find_video_text(native.video_token, render_own)
            self.videos = FamilyVideos(native, inputs.min_frames, equal_num_frames=inputs.equal_num_frames, text=text)
        self.video_token = None if self.videos is None else self.videos.token
        self.family_template = FamilyTemplate(
            self.tokenizer, family, self.own_template, self.image_token, self.video_token
        )
        self.media_tokens = [token for token in (self.image_token, self.video_token) if token is not None]
        self.special_tokens = special_token_pattern(self.tokenizer, *self.media_tokens)
        self.single_tokens = special_token_pattern(self.tokenizer)  # what stands for an image may be several
        self.coordinate_tokens = token_pattern(self.coordinates)
        self._cached_expansions = lru_cache(4096)(self._compute_expansions)
        if is_new and self.own_template != family.template:  # a row's own template writes what its processor adds
            self.check_chat()
            self.inputs = replace(inputs, form=self.calls.form)

    def __reduce__(self) -> tuple[type["FamilyProcessor"], tuple[object, ...]]:
        """Pickle the arguments, so that a data worker makes its own."""
        return type(self), (self.native, self.family, self.chat_template, self.inputs)

    @property
    def image_token_id(self) -> int:
        """The id at whose positions image features are placed: the most frequent one of an image."""
        return self._media_token_ids[0]

    @property
    def video_token_id(self) -> int | None:
        """The id at whose positions features of videos are placed: that of the video token, or that of images."""
        return self._media_token_ids[1]

    @cached_property
    def _media_token_ids(self) -> tuple[int, int | None]:
        image_id = self.calls.most_frequent_id(self._cached_expansions(((SIDE, SIDE),))[0])
        if self.videos is None:
            return image_id, None
        video_id: int = self.tokenizer.convert_tokens_to_ids(self.videos.token)
        ids, _ = self.tokenize(self.videos.token, (), [self.videos.minimal_clip])
        return image_id, video_id if video_id in ids else image_id

    @property
    def encodes_videos_separately(self) -> bool:
        """Whether the model encodes videos in a call of their own."""
        return self.videos is not None and not self.inputs.joined

    @cached_property
    def _lead(self) -> str:
        """A special token that is one id."""
        ids = self.tokenizer(self.image_token, add_special_tokens=False)["input_ids"]
        return self.image_token if len(ids) == 1 else str(self.tokenizer.eos_token)

    def image_token_ids(self) -> list[int]:
        """Return the ids of a single small image."""
        return self.tokenize(self.image_token, (), [(64, 64)])[0]

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
    ) -> str:
        """Return a conversation as text, with a token for each image and video.

        Contents may be strings with such tokens; the template gets them as lists of text, images and videos.
        """
        assert self.chat_template is not None
        return self.family_template.render(
            conversation,
            self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            enable_thinking=enable_thinking,
        )

    # --- text -------------------------------------------------------------------------------------------------------

    def tokenize(
        self, text: str, user_spans: Sequence[tuple[int, int]] = (), sizes: Sequence[Size | Clip] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a rendered conversation, and the character span that each id comes from.

        Tokens of images and videos are expanded as in the family's processor, and the whole text is tokenised at once.
        Only special tokens that a user spelled are split. Arguments are those of `Processor.tokenize`.

        Raises:
            ProcessorMismatchError: the family's own processor has other ids for the text.
            MediaMismatchError: the text has more or fewer such tokens than there are images and videos, or in another
                order where the model reads both by the same inputs.
        """
        expanded = self._expand_media_tokens(text, user_spans, sizes)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and bos in text[: user_spans[0][0] if user_spans else None]  # the template wrote it already
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, end in pairwise([0, *expanded.cuts, len(expanded.text)]):
            continues_text = start > 0
            lead = self._lead if continues_text else ""  # tokenizers begin no new word behind a token
            piece = lead + expanded.text[start:end]
            adds_bos = not continues_text and not has_bos and self.inputs.form.adds_special_tokens
            new, offsets = encode_with_spans(self.tokenizer, piece, add_special_tokens=adds_bos)
            origin = start - len(lead)
            ids += new[continues_text:]
            spans += [(origin + a, origin + b) if b else (0, 0) for a, b in offsets[continues_text:]]
        if self.inputs.form.prepends_bos and not has_bos:
            ids, spans = [self.tokenizer.bos_token_id, *ids], [(0, 0), *spans]
        if sizes and not self.inputs.form.replaces_tokens:
            self._check_ids(text, user_spans, sizes, ids)
        return ids, expanded.map_to_rendered(spans)

    def _expand_media_tokens(
        self, text: str, user_spans: Sequence[tuple[int, int]], sizes: Sequence[Size | Clip]
    ) -> ExpandedText:
        """Return the text with expanded media tokens, which knows where spelled special tokens are split."""
        places, cuts, coordinates = [], [], self.coordinate_tokens
        is_spelled = span_finder(user_spans)
        for match in self.special_tokens.finditer(text):
            if is_spelled(*match.span()) and not (coordinates and coordinates.fullmatch(match.group())):
                inner = [token.start() for token in self.single_tokens.finditer(match.group())] or [0]
                cuts += [match.start() + start + 1 for start in inner]  # neither half is a special token
            elif match.group() in self.media_tokens:
                places.append(match.span())
        expansions = self._get_expansions([text[start:end] for start, end in places], sizes)
        return expand_text(text, places, self.calls.join(expansions, text, places), cuts)

    def _get_expansions(self, tokens: list[str], sizes: Sequence[Size | Clip]) -> list[str]:
        """Return the expansion of each image and video, in the order of their tokens in the text."""
        expected = [self.video_token if isinstance(size, Clip) else self.image_token for size in sizes]
        for token, kind in zip(self.media_tokens, ("images", "videos"), strict=False):
            given, written = expected.count(token), tokens.count(token)
            if given != written:
                raise MediaMismatchError(f"{given} {kind} given, but the text has {written} {token}")
        if self.inputs.joined and tokens != expected:
            raise MediaMismatchError("the template moves videos behind images, and the model cannot tell them apart")
        images = tuple(size for size in sizes if not isinstance(size, Clip))
        of_images = iter(self._cached_expansions(images) if images else ())
        of_videos = iter([self.videos.expansion(size) for size in sizes if self.videos and isinstance(size, Clip)])
        return [next(of_videos if token == self.video_token else of_images) for token in tokens]

    def _compute_expansions(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """Return the expansions of images of these sizes in one sample; their content does not matter."""
        expansions = self.calls.expand(make_blanks(sizes))
        if (budget := self.image_token_budget) is not None:
            for (height, width), expansion in zip(sizes, expansions, strict=True):
                if (number := self.count_tokens(expansion)) > budget:
                    raise ProcessorRefusalError(
                        f"{width} x {height} pixels take {number} tokens, more than the budget of {budget} "
                        "(dataset.max_image_tokens): its sides differ too much"
                    )
        return expansions

    def _check_ids(
        self, text: str, user_spans: Sequence[tuple[int, int]], sizes: Sequence[Size | Clip], ids: list[int]
    ) -> None:
        """Compare ids with those of the family's own call; special tokens that users spelled are left out of both."""
        is_spelled = span_finder(user_spans)
        plain = self.special_tokens.sub(lambda match: "" if is_spelled(*match.span()) else match.group(), text)
        if plain != text:
            self.tokenize(plain, (), sizes)
        else:
            self.calls.check_ids(ids, text, make_blanks([size for size in sizes if not isinstance(size, Clip)]))

    def check_chat(self) -> None:
        """Compare the ids of a small conversation with those that the family's own processor has for it.

        Raises:
            ProcessorMismatchError: they differ.
        """
        words = f"{self.image_token}{WORDS}"
        text = self.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
        blanks = [(SIDE, SIDE)]
        self.calls.check_ids(self.tokenize(text, (), blanks)[0], text, make_blanks(blanks))

    @property
    def coordinates(self) -> str | None:
        """The convention of coordinates: kept and saved among the settings of the native image processor."""
        return getattr(self.image_processor, "coordinates", None)

    def use_coordinates(self, name: str, tokens: re.Pattern[str] | None) -> None:
        """Set the convention of coordinates and what matches its tokens, which are tokens in users' texts, too."""
        self.image_processor.coordinates, self.coordinate_tokens = name, tokens

    # --- images -----------------------------------------------------------------------------------------------------

    def count_tokens(self, expansion: str) -> int:
        """Return the number of tokens of a text that an image is replaced by."""
        return len(encode_with_spans(self.tokenizer, expansion)[0])

    @property
    def image_token_budget(self) -> int | None:
        """The most tokens of an image (`dataset.max_image_tokens`), saved as `alpha_background` is; None: no limit."""
        return getattr(self.image_processor, "image_token_budget", None)

    @image_token_budget.setter
    def image_token_budget(self, budget: int) -> None:
        """Set the most tokens of an image: those that would take more are refused."""
        self.image_processor.image_token_budget = budget
        self._cached_expansions.cache_clear()

    def replace_processors(self, *, image_processor: object = None, video_processor: object = None) -> None:
        """Put other processors of images or videos in place, such as with other options; they are saved with this."""
        for attribute, made in (("image_processor", image_processor), ("video_processor", video_processor)):
            if made is not None:
                setattr(self.native, attribute, made)
        self.image_processor = self.native.image_processor
        self._cached_expansions.cache_clear()
        if self.videos is not None:
            self.videos.forget_sizes()
        vars(self).pop("_media_token_ids", None)

    def expand_blank(self, image: Image.Image | Tensor) -> str:
        """Return the text that the token of a single image is replaced by; of a tensor `(3, height, width)`, too.

        The tensor may be on the meta device, where the image processor reads no pixel to decide on its size.
        """
        return self.calls.expand([cast(Image.Image, image)])[0]

    @property
    def alpha_background(self) -> str:
        """What shows through transparent images: kept and saved among the settings of the native image processor."""
        return getattr(self.image_processor, "alpha_background", "white")

    @alpha_background.setter
    def alpha_background(self, name: str) -> None:
        """Set what shows through transparent images."""
        self.image_processor.alpha_background = name

    def as_rgb(self, image: Image.Image) -> Image.Image:
        """Return an image as the family's processor gets it: upright, in RGB, without transparency."""
        return as_rgb(image, self.alpha_background)

    def _process_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the inputs of a sample's images."""
        return image_inputs_of(self.calls.process(images)[0], self.inputs.text_inputs)

    def image_inputs(self, images: Sequence[Medium], sizes: Sequence[MediaSize] = ()) -> dict[str, Tensor]:
        """Return the inputs of a sample's images and videos from the family's processor; empty without any.

        Where images and videos share inputs, they are there in order.
        """
        videos = [image for image in images if isinstance(image, DecodedVideo)]
        if videos and self.inputs.joined:
            parts = [self._process_one(image) for image in images]
            shift_indices(parts, self.row_indices)
            return joined(parts, self.per_sample_inputs, self.inputs.dims)
        stills = [self.as_rgb(cast(Image.Image, image)) for image in images if not isinstance(image, DecodedVideo)]
        inputs = self._process_images(stills) if stills else {}
        read = [self._process_one(video) for video in videos]
        shift_indices(read, self.row_indices)
        return inputs | joined(read, self.per_sample_inputs, self.inputs.dims)

    def _process_one(self, image: Medium) -> dict[str, Tensor]:
        """Return the inputs of a single image or video."""
        if self.videos is None or not isinstance(image, DecodedVideo):
            return self._process_images([self.as_rgb(cast(Image.Image, image))])
        return image_inputs_of(self.videos.inputs(image), self.inputs.text_inputs)

    def text_inputs(self, ids: Sequence[int], labels: Sequence[int], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs named in `per_token_inputs`: `(tokens, …)` each."""
        makers = self.inputs.makers.items()
        return {name: make(ids, labels, images) for name, make in makers if images or name != MASK_OF_IMAGES}

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return the pixels unchanged: the family's processor has normalised them."""
        return pixels

    # --- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, object]:
        """Return the processor's settings."""
        return self.native.to_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the family's own processor, with the template in use."""
        if self.chat_template != self.own_template or self.native.chat_template is None:
            self.native.chat_template = self.chat_template
        self.native.save_pretrained(folder)


def load_family_processor(
    name: str, family: Family, *, revision: str | None = None, trust_remote_code: bool = False
) -> FamilyProcessor:
    """Load the processor of a Hub name or folder.

    Raises:
        ProcessorMismatchError: there is none that can be used here.
    """
    native = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(native, ProcessorMixin):
        raise ProcessorMismatchError(
            f"{family.name}: AutoProcessor opens a {type(native).__name__} there, which does not prepare texts and "
            "images together; a processor_config.json that names a processor is missing"
        )
    return FamilyProcessor(native, family)


def make_blanks(sizes: Sequence[Size]) -> list[Image.Image]:
    """Return black images of these heights and widths."""
    return [Image.new("RGB", (width, height)) for height, width in sizes]
