"""Counts by words are exactly those of encoded conversations, whatever the template and the tokenizer."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from tests.data.encoding.test_word_counts import PRE_TOKENIZERS
from tests.tiny_parts import CHAT_TEMPLATES, Parts, byte_tokenizer
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.plain_counts import ImagePlace, PlainCounter, TokenCounts, make_plain_counter
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.sample import BadSample, ContentPart, ImageRef, MediaSize, Sample, Turn
from vlm.models import VLMProcessor

IMAGE = ImageRef(Path("image.png"))
TEXTS = (
    "a cat", "It's 12 o'clock.", "two\nlines", "  blanks ", "\nwhat is it?", "yes", "...", "\t(x) ", "1, 2, 345", "'s",
    "naïve", "\u00e9\u0301", "\u0301a", "“猫” 🐱", "\u3000 x\u00a0", "it says <image>", "a < b", "<s>", "say 'll", "-",
    "end\n\n", "", " ", "\x1f", "\x1c\x1d.", "\n\n1", "[INST]",
)  # fmt: skip
SIZES: tuple[MediaSize, ...] = ((40, 30), (24, 90))
NATIVE = {"patch_size": 8, "multiple": 1, "factor": 1, "min_patches": 4, "max_patches": 20}
TILES = {"side": 24, "patch": 8}


def make_processor(parts: Parts, template: str, words: str, **options: Any) -> VLMProcessor:
    """Return a processor whose tokenizer cuts texts into `words` as a row of `PRE_TOKENIZERS` does."""
    tokenizer = byte_tokenizer(template)
    tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[words]()
    if words == "qwen":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<begin>", "<end>"]})
    options = {"tokens_per_image": 3, **options}
    return VLMProcessor(parts.processor().image_processor, tokenizer, chat_template=template, **options)


def draw_sample(draw: random.Random, max_images: int) -> Sample:
    turns = [Turn("system", (draw.choice(TEXTS),))] if draw.random() < 0.2 else []
    images = 0
    for _ in range(draw.choice((1, 1, 2))):
        question: list[ContentPart] = [draw.choice(TEXTS)]
        if images < max_images and draw.random() < 0.5:
            question[draw.randint(0, 1) :] = [IMAGE, *question]
            images += 1
        turns += [Turn("user", tuple(question)), Turn("assistant", (draw.choice(TEXTS),), draw.random() < 0.9)]
    return Sample("x", tuple(turns))


def count_encoded(encoder: SampleEncoder, sample: Sample, sizes: tuple[MediaSize, ...]) -> TokenCounts | None:
    """Return the counts of an encoded sample; None where it cannot be used."""
    try:
        encoded = encoder.encode(sample, sizes)
    except BadSample:
        return None
    supervised = len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)
    return TokenCounts(len(encoded.input_ids), encoder.min_length(encoded), supervised)


def check_counts(processor: VLMProcessor, seed: str, number: int) -> PlainCounter:
    """Check that counts are those of encoded samples; return what counts them."""
    draw = random.Random(seed)
    encoder = SampleEncoder(processor, NO_LIMIT, truncate=False)
    counter = make_plain_counter(encoder)
    assert counter is not None
    max_images = 2 if processor.needs_image_sizes else 3
    for _ in range(number):
        sample = draw_sample(draw, max_images)
        sizes = SIZES[: len(sample.media)] if processor.needs_image_sizes else ()
        expected = count_encoded(encoder, sample, sizes)  # renders it, so that its structure gets known
        if (counts := counter.count(sample, sizes)) is not None:
            assert counts == expected, sample.turns
    return counter


@pytest.mark.parametrize("words", PRE_TOKENIZERS)
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_counts_are_those_of_encoded_conversations(parts: Parts, template: str, words: str):
    processor = make_processor(parts, CHAT_TEMPLATES[template].text, words)
    counter = check_counts(processor, f"{template} {words}", 150)
    is_counted = counter.count(learn(counter, "a", "b")) is not None
    assert is_counted == CHAT_TEMPLATES[template].end.startswith("<"), "a reply ends with a special token"


IMAGES = {
    "start and end": {"image_start": "<begin>", "image_end": "<end>"},
    "native": {"image_mode": "native", "native": NATIVE, "image_end": "<end>"},
}


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_tokens_of_images_are_counted(parts: Parts, options: dict[str, Any]):
    processor = make_processor(parts, CHAT_TEMPLATES["chatml"].text, "gpt2", **options)
    counter = check_counts(processor, str(options), 300)
    assert any(ImagePlace() in (outline or ()) for outline in counter._outlines.values())


def learn(counter: PlainCounter, question: str, reply: str) -> Sample:
    """Return a conversation whose structure is known."""
    for number in range(3):
        counter.encoder.encode(Sample("x", (Turn("user", (f"q{number}",)), Turn("assistant", ("r",)))))
    return Sample("x", (Turn("user", (question,)), Turn("assistant", (reply,))))


def test_a_word_that_reaches_into_the_reply_is_left_to_the_encoder(parts: Parts):
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% else %}<|im_end|>{% endif %}{% endfor %}"
    )
    counter = make_plain_counter(SampleEncoder(make_processor(parts, template, "gpt2"), NO_LIMIT, truncate=False))
    assert counter is not None
    assert counter.count(learn(counter, "a", "b")) is not None
    assert counter.count(learn(counter, "a", ": b")) is None  # "::" is one word


def test_other_encoders_are_not_counted_by_words(parts: Parts):
    processor = make_processor(parts, CHAT_TEMPLATES["chatml"].text, "gpt2")
    assert make_plain_counter(SampleEncoder(processor, 8, truncate=False)) is not None
    assert make_plain_counter(PromptEncoder(processor, 8, truncate=False)) is None
    assert make_plain_counter(SampleEncoder(processor, 8, truncate=False, supervise="llava-onevision")) is None
