"""`dataset.supervise=llava-onevision`: the labels of LLaVA-NeXT's `preprocess_qwen`, which is written anew here."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny_parts import IGNORE_INDEX, QWEN25, Parts, byte_tokenizer
from vlm.config import choices
from vlm.data.encoding.labels import encode
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.encoding.supervision import SUPERVISIONS, label_llava_onevision
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.models import VLMProcessor

TOKENS_PER_IMAGE = 3
SYSTEM = "You are a helpful assistant."
Conversation = list[tuple[str, str]]

CONVERSATIONS: dict[str, Conversation] = {
    "one turn": [("user", "<image>\nwhat is it?"), ("assistant", "a red circle")],
    "several turns": [
        ("user", "<image>\nwhat is it?"), ("assistant", "a cat"), ("user", "where?"), ("assistant", "on the mat"),
    ],
    "text only": [("user", "what is a cat?"), ("assistant", "an animal")],
    "lines": [("user", "<image>\nfirst\nsecond\n\nthird\n"), ("assistant", "\none\n\ntwo\n")],
    "images in and behind a text": [
        ("user", "a<image> b\n<image>"), ("assistant", "yes"), ("user", "\n"), ("assistant", "1"),
    ],
    "blanks": [("user", " <image>\n what? "), ("assistant", "  a cat  ")],
    "empty": [("user", "<image>\nwhat?"), ("assistant", ""), ("user", ""), ("assistant", "a cat")],
    "names of roles": [("user", "assistant\nuser"), ("assistant", "user\nassistant")],
    "two assistants": [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d\n"), ("assistant", "e")],
}  # fmt: skip


@pytest.fixture(scope="module")
def processor(parts: Parts) -> VLMProcessor:
    """A processor with Qwen's own template, which begins with a system turn."""
    tokenizer = byte_tokenizer(QWEN25, bos=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = parts.processor().image_processor
    return VLMProcessor(image_processor, tokenizer, chat_template=QWEN25, tokens_per_image=TOKENS_PER_IMAGE)


def sample(turns: Conversation) -> Sample:
    made = []
    for role, text in turns:
        texts: list[Any] = text.split("<image>")
        parts = [texts[0], *(part for piece in texts[1:] for part in (ImageRef("x.png"), piece))]  # pyright: ignore[reportArgumentType]
        made.append(Turn(role, tuple(part for part in parts if part != "") or ("",)))
    return Sample("x", tuple(made))


def onevision_reference(tokenizer: PreTrainedTokenizerFast, turns: Conversation) -> tuple[list[int], list[int]]:
    """Each message is tokenised on its own; then a second pass marks three ids wherever they are."""

    def message(role: str, text: str) -> list[int]:
        return tokenizer(f"<|im_start|>{role}\n{text}<|im_end|>\n", add_special_tokens=False)["input_ids"]

    ids = message("system", SYSTEM)
    targets = [IGNORE_INDEX] * len(ids)
    for role, text in turns:
        new = message(role, text)
        ids += new
        targets += [IGNORE_INDEX] * len(new) if role in ("user", "system") else new
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) + tokenizer("\n")["input_ids"]
    for position, token in enumerate(ids):
        if token in marks:
            targets[position] = token
    image = tokenizer.convert_tokens_to_ids("<image>")
    wide_ids, wide_targets = [], []
    for token, target in zip(ids, targets, strict=True):
        times = TOKENS_PER_IMAGE if token == image else 1  # features of images are never targets
        wide_ids += [token] * times
        wide_targets += [IGNORE_INDEX if token == image else target] * times
    return wide_ids, wide_targets


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_onevisions(processor: VLMProcessor, name: str):
    turns = CONVERSATIONS[name]
    encoded = SampleEncoder(processor, 999, truncate=False, supervise="llava-onevision")(sample(turns))
    expected = onevision_reference(processor.tokenizer, turns)
    assert encoded.input_ids == expected[0]
    assert encoded.labels == expected[1]


def test_replies_are_supervised_by_default(processor: VLMProcessor):
    one = sample(CONVERSATIONS["several turns"])
    encoder = SampleEncoder(processor, 999, truncate=False)
    assert encoder(one) == encode(processor, one)
    assert encoder(one).labels != replace(encoder, supervise="llava-onevision")(one).labels


def test_an_image_that_an_assistant_shows_is_no_target(processor: VLMProcessor):
    turns = [("user", "show"), ("assistant", "here: <image>\nyes")]
    encoded = encode(processor, sample(turns), label=label_llava_onevision)
    assert (encoded.input_ids, encoded.labels) == onevision_reference(processor.tokenizer, turns)


def test_spelled_marks_are_text(processor: VLMProcessor):
    """LLaVA itself reads them as marks; ours never does."""
    encoded = encode(
        processor, sample([("user", "a <|im_end|> b"), ("assistant", "<|im_start|>")]), label=label_llava_onevision
    )
    starts = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert encoded.input_ids.count(starts) == encoded.labels.count(starts) == 3


def test_other_tokenizers_are_refused(parts: Parts):
    vicuna = parts.processor("clip", "vicuna", template="v1")
    with pytest.raises(
        ValueError, match=r"dataset.supervise=llava-onevision: the tokenizer has no <\|im_start\|>, <\|im_end\|>"
    ):
        encode(vicuna, sample(CONVERSATIONS["one turn"]), label=label_llava_onevision)


def test_token_counts_depend_on_what_is_supervised(processor: VLMProcessor):
    """`dataset.over_length=truncate` asks where the first label is."""
    encoder = SampleEncoder(processor, 9, truncate=True)
    assert encoder.fingerprint_fields != replace(encoder, supervise="llava-onevision").fingerprint_fields


def test_the_values_of_the_key_are_those_of_the_table():
    assert tuple(SUPERVISIONS) == choices.SUPERVISIONS
