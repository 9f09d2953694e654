"""A family's own processor, as transformers has it: the token of an image, and what a call of it returns.

Every id and every pixel comes from such a call. What differs between processors is found by calling them: which text
an image's token is replaced by, and whether special tokens are added around a text.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlm.families.token_spans import encode_with_spans

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "cross_attention_mask")
"""Outputs of a processor for its text; further ones are found by their length."""
REPLACEMENTS = "text_replacement_offsets"

Outputs = dict[str, object]
Render = Callable[[list[dict[str, object]]], str]
"""Renders messages with a chat template."""


class ProcessorMismatchError(ValueError):
    """A family's own processor does not do what the ids or inputs of a sample need; the message says what."""


class NativeProcessor:
    """Calls of a family's own processor for the images of one sample.

    Args:
        native: the processor.
        image_token: the text that stands for an image.
    """

    def __init__(self, native: ProcessorMixin, image_token: str):
        self.native, self.image_token = native, image_token
        self.tokenizer = native.tokenizer
        self.replaces_tokens = True
        """Whether a call says which text each token was replaced by; else each text is compared with a call's ids."""
        self.adds_special_tokens = True
        """Whether a call lets the tokenizer add special tokens around a text."""

    def __call__(self, text: str, images: Sequence[Image.Image]) -> Outputs:
        """Return all outputs for a text with the images of one sample, as for a conversation rendered to that text."""
        bos = self.tokenizer.bos_token
        options: dict[str, bool | str] = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        options |= {"return_tensors": "pt", "return_text_replacement_offsets": True}
        return dict(self.native(text=[text], images=[list(images)], **options))

    def process(self, images: Sequence[Image.Image]) -> tuple[Outputs, tuple[str, ...]]:
        """Return the outputs for a sample of images alone, and the text that each one's token is replaced by."""
        text = self.image_token * len(images)
        outputs = self(text, images)
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
        text = "".join(expansions)
        if self._has_ids(text, outputs) or self._has_as_many_ids(text, outputs):
            return expansions
        self.replaces_tokens = False
        return tuple(self._expand_by_ids(image) for image in images)

    def check_ids(self, ids: list[int], text: str, images: Sequence[Image.Image]) -> None:
        """Raise ProcessorMismatchError where the processor has other ids for a text."""
        own = _first_row(self(text, images))
        if own != ids:
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
        for added in (0, *range(1, len(around) + 1)):
            inner = ids[added : len(ids) - (len(around) - added if added else 0)]
            text = str(self.tokenizer.decode(inner, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            if encode_with_spans(self.tokenizer, text)[0] == inner and self._has_ids(text, outputs):
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
        for adds in (True, False):
            if encode_with_spans(self.tokenizer, text, add_special_tokens=adds)[0] == ids:
                plain = encode_with_spans(self.tokenizer, text)[0]
                self.adds_special_tokens = adds or plain == encode_with_spans(
                    self.tokenizer, text, add_special_tokens=True
                )[0]  # fmt: skip
                return True
        return False

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
            inputs[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProcessorMismatchError(f"its output {name} is no tensor: {type(value).__name__}") from error
    return inputs


def find_image_token(native: ProcessorMixin, render: Render | None) -> str:
    """Return the text that stands for an image: the processor's own token, or what its template writes for an image.

    Raises:
        ProcessorMismatchError: there is neither.
    """
    token = getattr(native, "image_token", None)
    if token is not None:
        return str(token)
    if render is not None:
        words = {"type": "text", "text": "words"}
        texts = [render([{"role": "user", "content": content}]) for content in ([words], [{"type": "image"}, words])]
        if token := _inserted(*texts).strip():
            return token
    raise ProcessorMismatchError(
        f"{type(native).__name__} names no image_token, and its chat template writes nothing for an image: nothing "
        "says where an image stands in a text"
    )


def _inserted(before: str, after: str) -> str:
    """Return what a text has more than another one, at one place."""
    start = next(
        (place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before)
    )
    end = len(after) - (len(before) - start)
    return after[start:end] if before == after[:start] + after[end:] else ""
