"""A family's own processor, as transformers has it: the token of an image, and what a call of it returns.

Every id and every pixel comes from such a call. What differs between processors is found by calling them: which text
an image's token is replaced by, and whether special tokens are added around a text.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlm.families.token_spans import encode_with_spans

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "cross_attention_mask")
"""Outputs of a processor for its text; further ones are found by their length."""
REPLACEMENTS = "text_replacement_offsets"
MODALITIES = "mm_token_type_ids"
"""The input that tells text, images and videos apart."""

WHOLE_TEXT = "return_for_text_completion"
"""The option of Chameleon's processor without which each text ends with a separator."""

WORD = re.compile(r"[^\s<]")
"""What a word begins with, and no special token."""

Outputs = dict[str, object]
Render = Callable[[list[dict[str, object]]], str]
"""Renders messages with a chat template."""


def call_options(native: ProcessorMixin) -> dict[str, bool]:
    """Return options without which a call leaves out an input of the model, or writes behind a text what it has not.

    Left out is what its own class counts among the model's inputs; written, what separates a prompt from its reply.
    """
    names: Sequence[str] = getattr(native, "model_input_names", ())
    is_left_out = MODALITIES in names and getattr(native, f"return_{MODALITIES}", None) is False
    options = {f"return_{MODALITIES}": True} if is_left_out else {}
    return options | ({WHOLE_TEXT: True} if getattr(native, WHOLE_TEXT, None) is False else {})


class ProcessorMismatchError(ValueError):
    """A family's own processor does not do what the ids or inputs of a sample need; the message says what."""


@dataclass(frozen=True)
class CallForm:
    """How a family's own processor is called for the images of one sample, and what it does to the text.

    Attributes:
        frame: what stands in a text for an image: its token, perhaps between others without which it is refused.
        nests_images: whether the images are given as a list for each text, or as one list.
        replaces_tokens: whether a call says which text it replaces each token by, or leaves each as it is; else each
            text is compared with the ids of a call.
        adds_special_tokens: whether the tokenizer adds special tokens around a text.
        prepends_bos: whether a call puts the token that begins a text before one that lacks it.
        parts_words: whether a call that does not say what it writes parts an image from a word behind it by a blank.
        shared_end: what such a call writes once between neighbouring images, whose texts begin and end with it.
    """

    frame: str
    nests_images: bool = True
    replaces_tokens: bool = True
    adds_special_tokens: bool = True
    prepends_bos: bool = False
    parts_words: bool = False
    shared_end: str = ""


class NativeProcessor:
    """Calls of a family's own processor for the images of one sample.

    Args:
        native: the processor.
        image_token: the text that stands for an image.
        form: how it is called; the first call changes it where need be.
    """

    def __init__(self, native: ProcessorMixin, image_token: str, form: CallForm):
        self.native, self.image_token, self.form = native, image_token, form
        self.tokenizer = native.tokenizer
        self._call: Callable[..., Mapping[str, object]] = native  # its keywords differ between processors
        self._options = call_options(native)

    def __call__(self, text: str, images: Sequence[Image.Image]) -> Outputs:
        """Return all outputs for a text with the images of one sample, as for a conversation rendered to that text."""
        bos = self.tokenizer.bos_token
        options = dict(self._options)
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        given = [list(images)] if self.form.nests_images else list(images)
        return dict(
            self._call(text=[text], images=given, return_tensors="pt", return_text_replacement_offsets=True, **options)
        )

    def call_twice(self, image: Image.Image) -> Outputs:
        """Return all outputs for two samples of one and the same image."""
        given = [[image], [image]] if self.form.nests_images else [image, image]
        return dict(self._call(text=[self.form.frame] * 2, images=given, return_tensors="pt", padding=True))

    def find_form(self, image: Image.Image) -> None:
        """Find a form in which the processor can be called for an image.

        Raises:
            ProcessorMismatchError: there is none.
        """
        frames = dict.fromkeys((self.image_token, self.form.frame))
        errors: list[str] = []
        for frame, nests in product(frames, (True, False)):
            self.form = replace(self.form, frame=frame, nests_images=nests)
            try:
                self(frame, [image])
            except Exception as error:  # processors raise what they like
                errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            else:
                return
        raise ProcessorMismatchError(f"{self._name} cannot be called for one image: {errors[0]}")

    def process(self, images: Sequence[Image.Image]) -> tuple[Outputs, tuple[str, ...]]:
        """Return the outputs for a sample of images alone, and the text that each one's token is replaced by."""
        outputs = self(self.form.frame * len(images), images)
        replacements = outputs.pop(REPLACEMENTS, None)
        if isinstance(replacements, list) and replacements and replacements[0]:
            return outputs, tuple(str(replacement["replacement"]) for replacement in replacements[0])
        return outputs, (self.image_token,) * len(images)  # a family that writes one token for any image

    def expand(self, images: Sequence[Image.Image]) -> tuple[str, ...]:
        """Return the text that each image's token is replaced by, compared with the ids of the processor's own call.

        Raises:
            ProcessorMismatchError: the processor's ids are others.
        """
        outputs, expansions = self.process(images)
        text = "".join(self.form.frame.replace(self.image_token, expansion) for expansion in expansions)
        if self._has_ids(text, outputs) or self._has_as_many_ids(text, outputs):
            return expansions
        self.form = replace(self.form, replaces_tokens=False)
        return tuple(self._expand_by_ids(image) for image in images)

    def find_joints(self, image: Image.Image, words: str) -> None:
        """Find out what a call that does not say what it writes changes where an image meets words or another one.

        Whatever else it may do shows in `check_ids`, text by text.
        """
        if self.form.replaces_tokens:
            return
        frame, (text,) = self.form.frame, self.expand([image])
        before, after = frame.split(self.image_token, 1)
        beside = self(f"{frame}{words}", [image])
        if not after and not self._has_ids(f"{before}{text}{words}", beside):
            self.form = replace(self.form, parts_words=self._has_ids(f"{before}{text} {words}", beside))
        end = str(self.tokenizer.decode(encode_with_spans(self.tokenizer, text)[0][:1]))
        if frame == self.image_token and text != end and text.endswith(end):
            try:
                two = self(frame * 2, [image, image])
            except Exception:  # a processor that takes one image for a text
                return
            if self._has_ids(f"{text.removesuffix(end)}{text}", two):
                self.form = replace(self.form, shared_end=end)

    def join(self, expansions: Sequence[str], text: str, places: Sequence[tuple[int, int]]) -> list[str]:
        """Return what images' tokens at these places of a text are replaced by, with what a call writes beside them."""
        joined = list(expansions)
        starts = {start for start, _ in places}
        for index, (_, end) in enumerate(places):
            if end in starts:
                joined[index] = joined[index].removesuffix(self.form.shared_end)
            elif self.form.parts_words and WORD.match(text, end):
                joined[index] += " "
        return joined

    def check_ids(self, ids: list[int], text: str, images: Sequence[Image.Image]) -> None:
        """Compare ids with those of the processor for a text; they may lack the one that begins a text.

        Raises:
            ProcessorMismatchError: the processor's are others.
        """
        own = _first_row(self(text, images))
        if own == [self.tokenizer.bos_token_id, *ids]:
            self.form = replace(self.form, prepends_bos=True)
        elif own != ids:
            place = next((place for place, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), len(ids))
            raise ProcessorMismatchError(
                f"{self._name} has {len(own)} ids for a text of {len(images)} images, which has {len(ids)} here; the "
                f"first that differ are {own[place : place + 4]} and {ids[place : place + 4]}: replies cannot be told "
                "from prompts"
            )

    def _expand_by_ids(self, image: Image.Image) -> str:
        """Return the text of the ids that a single image has."""
        outputs = self(self.image_token, [image])
        ids = _first_row(outputs)
        around = self.tokenizer("", add_special_tokens=True)["input_ids"]
        for before in range(len(around) + 1):
            inner = ids[before : len(ids) - (len(around) - before)]
            text = str(self.tokenizer.decode(inner, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if self._has_ids(text, outputs):
                return text
        raise ProcessorMismatchError(
            f"{self._name} does not say which text it writes for an image, and the ids of its call do not tell: "
            f"{len(ids)} ids for {self.image_token}"
        )

    def most_frequent_id(self, expansion: str) -> int:
        """Return the id where the features of an image are placed, by the text that its token is replaced by."""
        counts = Counter(encode_with_spans(self.tokenizer, expansion)[0])
        own = getattr(self.native, "image_token_id", None)
        added = self.tokenizer.added_tokens_decoder  # beside them, line breaks between images may be as many
        return max(counts, key=lambda token_id: (token_id in added, counts[token_id], token_id == own))

    def _has_as_many_ids(self, text: str, outputs: Outputs) -> bool:
        """Return whether a call has each id of a text as often as the text, whatever it writes around and between."""
        ids, own = Counter(_first_row(outputs)), Counter(encode_with_spans(self.tokenizer, text)[0])
        return all(ids[token_id] == count for token_id, count in own.items())

    def _has_ids(self, text: str, outputs: Outputs) -> bool:
        """Return whether a text has the ids of a call, with or without special tokens around it."""
        ids = _first_row(outputs)
        if encode_with_spans(self.tokenizer, text, add_special_tokens=True)[0] == ids:
            return True
        if encode_with_spans(self.tokenizer, text)[0] != ids:
            return False
        self.form = replace(self.form, adds_special_tokens=False)
        return True

    @property
    def _name(self) -> str:
        return type(self.native).__name__


def _first_row(outputs: Mapping[str, object]) -> list[int]:
    ids = torch.as_tensor(outputs["input_ids"])
    return ids[0].tolist()


def image_inputs_of(outputs: Mapping[str, object], text_inputs: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs of images among a processor's outputs, all as tensors.

    Raises:
        ProcessorMismatchError: an output is no tensor, so that samples cannot be put together.
    """
    inputs: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if name in text_inputs or name == REPLACEMENTS:
            continue
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProcessorMismatchError(f"its output {name} is not a tensor: {type(value).__name__}") from error
        inputs[name] = tensor.float() if tensor.is_floating_point() else tensor  # Llama 4's are bfloat16
    return inputs


def find_call_form(native: ProcessorMixin, render: Render | None) -> tuple[str, CallForm]:
    """Return the text that stands for an image, and how the processor may have to be called.

    A chat template writes that text for an image; where there is none, or it takes no lists, the processor names it.

    Args:
        native: the processor.
        render: renders messages with its own template; None: it has none.

    Raises:
        ProcessorMismatchError: neither says how an image stands in a text.
    """
    own: object = getattr(native, "image_token", None)
    token = None if own is None else str(own)
    written = [] if render is None else _render_medium(render, "image")
    if token is not None and (not written or any(token in text for text in written)):
        return token, CallForm(next((text for text in written if token in text), token))
    if written:  # of several readings, that which splits no special token
        text = min(written, key=lambda text: len(native.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return text, CallForm(text)
    raise ProcessorMismatchError(
        f"{type(native).__name__} names no image_token, and its chat template writes nothing for an image: nothing "
        "says where an image stands in a text"
    )


def find_video_text(token: str, render: Render | None) -> str:
    """Return the text that stands for a video by itself: its token, with what a template writes around it."""
    written = [] if render is None else _render_medium(render, "video")
    return next((text for text in written if token in text), token)


def _render_medium(render: Render, kind: str) -> list[str]:
    """Return what a template writes for an image or video, without blanks around it, in all its readings.

    Nothing where the template takes no lists, or writes nothing.
    """
    words: dict[str, object] = {"type": "text", "text": "words"}
    try:
        before, after = (
            render([{"role": "user", "content": content}]) for content in ([words], [{"type": kind}, words])
        )
    except Exception:  # a template may do anything with a list that it does not expect
        return []
    if "'type'" in after:  # the list itself
        return []
    return [text.strip() for text in _find_insertions(before, after) if text.strip()]


def _find_insertions(before: str, after: str) -> list[str]:
    """Return what a text has more than another one at one place; `<a>` before `<b>` may be `a><` too."""
    length = len(after) - len(before)
    starts = range(len(before) + 1) if length > 0 else range(0)
    return [after[at : at + length] for at in starts if before == after[:at] + after[at + length :]]
