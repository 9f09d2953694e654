"""Records of real English: questions and replies are passages of this repository's documentation.

No two are alike, and their words are as frequent as words of a language are, which matters where words are remembered.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.lengths import draw_records
from vlm.data.encoding.labels import read_template

DOCS = Path(__file__).parent.parent / "docs"
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"]
VOCABULARY = 16_000

Lengths = Iterable[tuple[tuple[int, int], ...]]
"""For each record, the number of words of each question and of its reply."""


def read_prose() -> list[str]:
    """Return the words of the documentation, with their punctuation, in order."""
    text = " ".join(file.read_text(encoding="utf-8") for file in sorted(DOCS.glob("*.md")))
    return [word for word in text.split() if not set(word) & set("<>|`#")]


def make_prose_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that was trained on the documentation."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator([" ".join(read_prose())], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = read_template("chatml")
    return tokenizer


def short_lengths(number: int) -> Lengths:
    """Yield the lengths of a short question and answer for each record."""
    draw = random.Random(0)
    for _ in range(number):
        yield ((draw.randint(5, 15), draw.randint(3, 15)),)


def llava_lengths(number: int) -> Lengths:
    """Yield lengths of LLaVA-665k's records."""
    for record in draw_records(number):
        yield record.turns


def write_prose_records(folder: Path, lengths: Lengths) -> Path:
    """Write records without images, one a line, and return their path."""
    (folder / "images").mkdir(parents=True)  # a run expects the folder
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, conversation in enumerate(_conversations(lengths)):
            file.write(json.dumps({"id": str(number), "conversations": conversation}) + "\n")
    return path


def _conversations(lengths: Lengths) -> Iterator[list[dict[str, str]]]:
    draw, words = random.Random(0), read_prose()
    for turns in lengths:
        conversation = []
        for pair in turns:
            for speaker, number in zip(("human", "gpt"), pair, strict=True):
                start = draw.randrange(max(len(words) - number, 1))
                conversation.append({"from": speaker, "value": " ".join(words[start : start + number])})
        yield conversation
