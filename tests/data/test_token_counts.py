"""Counting tokens: equal conversations are encoded once, and are counted as if they were not."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vlm.data import token_counts
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, Turn
from vlm.data.token_counts import TokenCounter


class WordEncoder(SampleEncoder):
    """An id for each word, those of replies supervised; remembers the samples that it has encoded."""

    def __init__(self):
        object.__setattr__(self, "encoded", [])

    def encode(self, sample: Sample, sizes: Sequence[MediaSize] = ()) -> Encoded:
        self.encoded.append(sample.id)  # pyright: ignore[reportAttributeAccessIssue]
        if "refuse" in str(sample.turns):
            raise BadSample(sample.id, "refused")
        ids, labels = [], []
        for turn in sample.turns:
            words = [len(word) for part in turn.content for word in str(part).split()]
            ids += words
            labels += words if turn.role == "assistant" else [IGNORE_INDEX] * len(words)
        return Encoded(ids, labels)

    def min_length(self, encoded: Encoded) -> int:
        return 1 + next(place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX)


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder()


def sample(name: str, question: str, reply: str, *images: ImageRef) -> Sample:
    return Sample(name, (Turn("user", (*images, question)), Turn("assistant", (reply,))))


def count_all(encoder: WordEncoder, *samples: Sample) -> list[tuple[int, int, int]]:
    counter = TokenCounter(encoder)
    return [counter.count(sample, ()) for sample in samples]


def test_equal_conversations_are_encoded_once(encoder: WordEncoder):
    samples = [sample(str(number), "what is this", "a cat" if number % 2 else "it is a dog") for number in range(6)]
    assert count_all(encoder, *samples) == [(7, 4, 4), (5, 4, 2)] * 3
    assert encoder.encoded == ["0", "1"]


@pytest.mark.parametrize(
    "other",
    [
        sample("b", "what is  this", "a cat"),
        sample("b", "what is this", "a cat "),
        Sample("b", (Turn("assistant", ("what is this",)), Turn("assistant", ("a cat",)))),
        Sample("b", (Turn("user", ("what is", " this")), Turn("assistant", ("a cat",)))),
        Sample("b", (Turn("system", ("",)), *sample("", "what is this", "a cat").turns)),
    ],
)
def test_conversations_that_differ_in_anything_are_encoded(encoder: WordEncoder, other: Sample):
    first = sample("a", "what is this", "a cat")
    assert count_all(encoder, first, other, first) == [
        count_all(WordEncoder(), one)[0] for one in (first, other, first)
    ]
    assert encoder.encoded == ["a", "b"]


def test_conversations_with_images_and_long_ones_are_not_kept_in_memory(encoder: WordEncoder):
    image = ImageRef(Path("image.png"))
    long = "word " * token_counts.LONGEST_REMEMBERED
    samples = [sample("image", "what is this", "a cat", image), sample("long", "what is this", long)]
    assert count_all(encoder, *samples, *samples) == count_all(WordEncoder(), *samples) * 2
    assert encoder.encoded == ["image", "long"] * 2


def test_a_bad_record_is_named_each_time(encoder: WordEncoder):
    counter = TokenCounter(encoder)
    for name in ("a", "b"):
        with pytest.raises(BadSample, match=f"record '{name}': refused"):
            counter.count(sample(name, "refuse", "a cat"), ())


def test_turns_without_a_hash_are_counted(encoder: WordEncoder):
    turns = Turn("user", ["what is this"]), Turn("assistant", ["a cat"])  # pyright: ignore[reportArgumentType]
    assert count_all(encoder, Sample("a", turns), Sample("b", turns)) == [(5, 4, 2)] * 2


def test_few_conversations_are_remembered(encoder: WordEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_counts, "REMEMBERED", 2)
    samples = [sample(str(number), "what " * number, "a cat") for number in range(1, 4)]
    assert count_all(encoder, *samples, *samples) == [(number + 2, number + 1, 2) for number in (1, 2, 3)] * 2
    assert encoder.encoded == ["1", "2", "3"] * 2


def test_an_image_that_cannot_be_converted_is_a_bad_sample(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    processor: Any = SimpleNamespace(as_rgb=lambda image: image.convert("no mode"))
    with pytest.raises(BadSample, match=r"the processor refuses image .*a\.png") as caught:
        token_counts._count_uniform(sample("1", "a", "b", ImageRef(tmp_path / "a.png")), processor)
    assert caught.value.file == str(tmp_path / "a.png")
