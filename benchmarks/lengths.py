"""Records as long as those of LLaVA-665k, drawn with a fixed seed, for measurements of speed.

    python -m benchmarks.lengths [--records 100000]

Known figures of that mixture are the number of records of each source, and mean, median and percentiles of their text
tokens. The numbers and lengths of turns are chosen here to reproduce those figures: sources like VQA have several short
turns with answers of a word or two, conversations have long replies, and records without an image are long. The words
are drawn too and mean nothing.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.demo.tiny_models import make_word_tokenizer

MAX_LENGTH = 2000
"""Largest number of text tokens in a record; a longer record is drawn again."""
TEMPLATE_TOKENS = 10
"""Number of tokens that ChatML adds to a question and its reply."""
PUBLISHED_FIGURES = {"mean": 230, "median": 140, "90th percentile": 300, "99th percentile": 1900, "longest": 2000}
"""Approximate numbers of text tokens in a record of LLaVA-665k, with a tokenizer like SmolLM2's."""


@dataclass(frozen=True)
class Source:
    """One source of the mixture; lengths are log-normal.

    Attributes:
        name: LLaVA-1.5's name of the source.
        thousands: number of records, in thousands.
        turns: least and greatest number of questions in a record.
        question: median number of words in a question, and the deviation of its logarithm.
        reply: the same for a reply.
        has_image: whether records have an image.
    """

    name: str
    thousands: float
    turns: tuple[int, int]
    question: tuple[float, float]
    reply: tuple[float, float]
    has_image: bool = True


SOURCES = (
    Source("text only", 40.7, (4, 15), (30, 0.9), (150, 0.7), has_image=False),
    Source("LLaVA conversation", 58, (2, 5), (12, 0.3), (25, 0.5)),
    Source("LLaVA detail", 23, (1, 1), (12, 0.3), (115, 0.3)),
    Source("LLaVA reasoning", 77, (1, 1), (18, 0.3), (120, 0.3)),
    Source("VQAv2", 83, (3, 8), (9, 0.3), (1.5, 0.4)),
    Source("GQA", 72, (5, 13), (10, 0.3), (1.2, 0.3)),
    Source("OKVQA", 9, (1, 2), (20, 0.3), (2, 0.4)),
    Source("OCR-VQA", 80, (3, 6), (9, 0.3), (5, 0.7)),
    Source("A-OKVQA", 66, (1, 2), (40, 0.3), (1.2, 0.2)),
    Source("TextCaps", 22, (1, 1), (60, 0.5), (14, 0.3)),
    Source("RefCOCO", 48, (2, 9), (12, 0.4), (14, 0.4)),
    Source("Visual Genome", 86, (2, 9), (14, 0.4), (12, 0.4)),
)


@dataclass(frozen=True)
class Record:
    """A record's lengths.

    Attributes:
        source: the source that it imitates.
        turns: numbers of words of each question and of its reply; a word is a token.
    """

    source: Source
    turns: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Number of text tokens, those of the template included."""
        return sum(question + reply + TEMPLATE_TOKENS for question, reply in self.turns)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens: replies, and the token that ends each."""
        return sum(reply + 1 for _, reply in self.turns)


def draw_records(number: int, seed: int = 0) -> list[Record]:
    """Return records of the mixture; a seed always gives the same ones."""
    draw = random.Random(seed)
    shares = [source.thousands for source in SOURCES]
    return [_draw_record(draw, draw.choices(SOURCES, shares)[0]) for _ in range(number)]


def _draw_record(draw: random.Random, source: Source) -> Record:
    while True:
        number = draw.randint(*source.turns)
        turns = [(_draw_length(draw, *source.question), _draw_length(draw, *source.reply)) for _ in range(number)]
        record = Record(source, tuple(turns))
        if record.tokens <= MAX_LENGTH:
            return record


def _draw_length(draw: random.Random, median: float, deviation: float) -> int:
    return max(1, round(median * math.exp(draw.gauss(0, deviation))))


def summarize_lengths(records: Sequence[Record]) -> dict[str, float]:
    """Return the figures of `PUBLISHED_FIGURES` for these records."""
    lengths = np.array([record.tokens for record in records])
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "90th percentile": float(np.percentile(lengths, 90)),
        "99th percentile": float(np.percentile(lengths, 99)),
        "longest": float(lengths.max()),
    }


# --- records on disk -------------------------------------------------------------------------------------------------


def write_records(folder: Path, records: Sequence[Record], side: int, seed: int = 0) -> Path:
    """Write `folder/records.json` in LLaVA's format, and a separate image for each record with an image.

    Args:
        folder: the folder; made where it does not exist.
        records: the lengths of the records.
        side: the side of the square images in pixels: that of the encoder, so that reading them costs little.
        seed: seeds words and images.

    Returns:
        The path of the records.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw, pixels = random.Random(seed), np.random.default_rng(seed)
    written = []
    for number, record in enumerate(records):
        content: dict[str, object] = {"id": str(number), "conversations": conversation(draw, record)}
        if record.source.has_image:
            content["image"] = f"{number}.jpg"
            coarse = Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
        written.append(content)
    path = folder / "records.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    return path


def conversation(draw: random.Random, record: Record) -> list[dict[str, str]]:
    """Return a LLaVA conversation as long as a record; some words are much more frequent than others."""
    turns = []
    for index, (question, reply) in enumerate(record.turns):
        mark = "<image>\n" if record.source.has_image and index == 0 else ""
        turns.append({"from": "human", "value": mark + _draw_text(draw, question)})
        turns.append({"from": "gpt", "value": _draw_text(draw, reply)})
    return turns


def _draw_text(draw: random.Random, words: int) -> str:
    vocabulary = find_single_token_words()
    return " ".join(vocabulary[int(len(vocabulary) * draw.random() ** 3)] for _ in range(words))


@cache
def find_single_token_words() -> list[str]:
    """Return words that are a single token for `make_word_tokenizer`, at the start of a text and after a space."""
    tokenizer = make_word_tokenizer()
    candidates = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())
    return [word for word in candidates if all(len(tokenizer.tokenize(text)) == 1 for text in (word, f" {word}"))]


def main() -> None:
    """Draw records, and print their figures beside the published ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    args = parser.parse_args()
    records = draw_records(args.records)
    print(f"{len(records):,} records; text tokens of a record:\n\n{'':<18}{'drawn':>8}{'LLaVA-665k':>12}")
    for name, value in summarize_lengths(records).items():
        print(f"{name:<18}{value:>8,.0f}{PUBLISHED_FIGURES[name]:>12,}")
    tokens, supervised = (sum(getattr(record, name) for record in records) for name in ("tokens", "supervised"))
    print(f"\nwith an image {statistics.mean(record.source.has_image for record in records):.1%}", end=", ")
    print(f"supervised {supervised / tokens:.1%} of the text tokens:\n")
    for source in SOURCES:
        matching = [record for record in records if record.source is source]
        share = sum(record.supervised for record in matching) / max(sum(record.tokens for record in matching), 1)
        mean = statistics.mean([record.tokens for record in matching] or [0])
        print(f"{source.name:<20}{len(matching) / len(records):>7.1%} of the records{mean:>8,.0f} tokens{share:>7.1%}")


if __name__ == "__main__":
    main()
