"""The lengths that speed is measured with: records as long as LLaVA-665k's, drawn with a fixed seed.

    python -m benchmarks.lengths [--records 100000]

What is known of that mixture is how many records each source gives, and mean, median and percentiles of their text
tokens. How many turns a source's records have and how long they are is chosen here so that those figures come out:
sources like VQA have several short turns with answers of a word or two, conversations have long replies, and records
without an image are long. The words are drawn too and mean nothing; nobody's text is in it.
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
"""Text tokens of a record, at most; a longer one is drawn again."""
TEMPLATE_TOKENS = 10
"""Tokens that ChatML puts around a question and its reply."""
PUBLISHED_FIGURES = {"mean": 230, "median": 140, "90th percentile": 300, "99th percentile": 1900, "longest": 2000}
"""Text tokens of a record of LLaVA-665k, as a tokenizer like SmolLM2's counts them, about."""


@dataclass(frozen=True)
class Source:
    """One source of the mixture; lengths are log-normal.

    Attributes:
        name: as LLaVA-1.5 calls it.
        thousands: its records, in thousands.
        turns: fewest and most questions of a record.
        question: median of the words of a question, and the deviation of their logarithm.
        reply: the same of a reply.
        image: whether its records have one.
    """

    name: str
    thousands: float
    turns: tuple[int, int]
    question: tuple[float, float]
    reply: tuple[float, float]
    picture: bool = True


SOURCES = (
    Source("text only", 40.7, (4, 15), (30, 0.9), (150, 0.7), picture=False),
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
        source: where it would come from.
        turns: words of each question and of its reply; a word is a token.
    """

    source: Source
    turns: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Text tokens, with what the template puts around each turn."""
        return sum(question + reply + TEMPLATE_TOKENS for question, reply in self.turns)

    @property
    def supervised(self) -> int:
        """Tokens that are learnt: replies, and the token that ends each."""
        return sum(reply + 1 for _, reply in self.turns)


def draw_records(number: int, seed: int = 0) -> list[Record]:
    """So many records of the mixture; a seed gives the same ones every time."""
    draw = random.Random(seed)
    shares = [source.thousands for source in SOURCES]
    return [_draw_record(draw, draw.choices(SOURCES, shares)[0]) for _ in range(number)]


def _draw_record(draw: random.Random, source: Source) -> Record:
    while True:
        number = draw.randint(*source.turns)
        record = Record(
            source,
            tuple((_draw_length(draw, *source.question), _draw_length(draw, *source.reply)) for _ in range(number)),
        )
        if record.tokens <= MAX_LENGTH:
            return record


def _draw_length(draw: random.Random, median: float, deviation: float) -> int:
    return max(1, round(median * math.exp(draw.gauss(0, deviation))))


def summarize_lengths(records: Sequence[Record]) -> dict[str, float]:
    """What `KNOWN` tells of the mixture, of these records."""
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
    """Write `folder/records.json` in LLaVA's format and an image of its own for each record that has one.

    Args:
        folder: made where it is missing.
        records: their lengths.
        side: of the square images in pixels; as the encoder sees them, so that reading them costs little.
        seed: of words and images.

    Returns:
        The file of records.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    draw, pixels = random.Random(seed), np.random.default_rng(seed)
    written = []
    for number, record in enumerate(records):
        one: dict[str, object] = {"id": str(number), "conversations": conversation(draw, record)}
        if record.source.picture:
            one["image"] = f"{number}.jpg"
            coarse = Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
        written.append(one)
    path = folder / "records.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    return path


def conversation(draw: random.Random, record: Record) -> list[dict[str, str]]:
    """A LLaVA conversation as long as a record; some words are much more frequent than others."""
    turns = []
    for place, (question, reply) in enumerate(record.turns):
        mark = "<image>\n" if record.source.picture and place == 0 else ""
        turns.append({"from": "human", "value": mark + _draw_text(draw, question)})
        turns.append({"from": "gpt", "value": _draw_text(draw, reply)})
    return turns


def _draw_text(draw: random.Random, words: int) -> str:
    known = find_single_token_words()
    return " ".join(known[int(len(known) * draw.random() ** 3)] for _ in range(words))


@cache
def find_single_token_words() -> list[str]:
    """Words that `make_word_tokenizer` reads as one token each, at the start of a text and behind a blank."""
    tokenizer = make_word_tokenizer()
    candidates = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())
    return [word for word in candidates if all(len(tokenizer.tokenize(text)) == 1 for text in (word, f" {word}"))]


def main() -> None:
    """Draw, and print the figures beside those that are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    args = parser.parse_args()
    records = draw_records(args.records)
    print(f"{len(records):,} records; text tokens of a record:\n\n{'':<18}{'drawn':>8}{'LLaVA-665k':>12}")
    for name, value in summarize_lengths(records).items():
        print(f"{name:<18}{value:>8,.0f}{PUBLISHED_FIGURES[name]:>12,}")
    tokens, supervised = (sum(getattr(one, name) for one in records) for name in ("tokens", "supervised"))
    print(f"\nwith an image {statistics.mean(one.source.picture for one in records):.1%}", end=", ")
    print(f"supervised {supervised / tokens:.1%} of the text tokens:\n")
    for source in SOURCES:
        own = [one for one in records if one.source is source]
        share = sum(one.supervised for one in own) / max(sum(one.tokens for one in own), 1)
        mean = statistics.mean([one.tokens for one in own] or [0])
        print(f"{source.name:<20}{len(own) / len(records):>7.1%} of the records{mean:>8,.0f} tokens{share:>7.1%}")


if __name__ == "__main__":
    main()
