"""Records that nobody meant: each becomes a sample that is encoded, or a `BadSample` in a few lines; none raises more.

Records are drawn by a seed, so that a failure repeats. What is mutated are the values of records of every format, and
the bytes of files of every kind.
"""

import base64
import json
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import SourceConfig
from vlm.config.shown import presentable
from vlm.data.dataset import encode_sample
from vlm.data.encoding.preference import PreferenceEncoder
from vlm.data.encoding.prompts import PromptEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.pairs.encoder import PairEncoder
from vlm.data.records.formats import FORMATS
from vlm.data.records.open import stream_records
from vlm.data.sample import BadSample
from vlm.data.skipped import Skipped
from vlm.data.sources import Source

SEED = 2311
NUM_RECORDS = {"short": 15, "long": 560}
"""Mutated records of each format."""
NUM_FILES = {"short": 4, "long": 100}
"""Damaged files of each kind."""
MAX_CHARACTERS = 4500
CONTROLS = frozenset("\0\x1b\r\x08\x9b\u202e\ud83d\udcff")

TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
CHAT = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a cat"}]
ITEMS = [{"type": "image"}, {"type": "text", "text": "what?"}]
RECORDS: dict[str, dict[str, Any]] = {
    "llava": {"id": "7", "image": "a.png", "conversations": TALK},
    "messages": {"images": ["a.png"], "messages": [{"role": "user", "content": ITEMS}, *CHAT[1:]],
                 "system": "be brief"},
    "caption": {"image": "a.png", "caption": "a cat"},
    "question": {"image": "a.png", "question": "what?", "choices": ["cat", "dog"], "answer": "cat", "answers": ["a"]},
    "head": {"source": "s", "images": ["a.png"], "conversations": ["<image> is it?", "yes"], "label": 1},
    "pair": {"query": {"text": "a cat", "image": "a.png"}, "positive": "an animal", "negatives": ["a plate"]},
    "preference": {"image": "a.png", "prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "a dog", "label": None},
    "labelled": {"image": "a.png", "prompt": "is it?", "label": "yes", "group": "g"},
    "alpaca": {"instruction": "say", "input": "x", "output": "y", "history": [], "images": ["a.png"]},
    "cauldron": {"images": ["a.png"], "texts": [{"user": "what?", "assistant": "a cat"}]},
    "minicpm": {"image": {"<image_00>": "a.png"}, "conversations": [{"role": "user", "content": "<image_00> what?"},
                                                                    {"role": "assistant", "content": "a cat"}]},
}  # fmt: skip

HALF = "\ud83d"
TEXTS = ["", " ", "\n", "\0", HALF, f"a {HALF} b", "\udcff", "\x1b[31mred\x1b[0m", "a\rb", "\u202egnp", "<image>",
         "x" * 40_000, "<image>" * 50, "<video>", "<image_00>", "<|im_end|>", "<|endoftext|>", "</s>", "{{ 7*7 }}",
         "{% for %}", "\ufdd0", "\ufdd1 1", "\ufffe", "👩\u200d👧", "</think>", "<think>" * 30, "null",
         "../outside.png",
         "/etc/passwd", "a.png\0", "http://h/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "data:,",
         "pipe:cat", "a.png",
         "A" * 5000, base64.b64encode(b"\x89PNG" + b"x" * 40_000).decode(), "../" * 2000,
         "é" * 300, "1e999", "-0"]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, None, True, False, 0, -1, 1.5, 10**40, float("nan"), float("inf"), [], {}, [[]], [{}], [None], {"": ""},
    b"\x89PNG\r\n", b"", {"bytes": b"x", "path": None}, {"bytes": None, "path": "a.png"}, {"path": "../a.png"},
    [1, "a"], {"url": "a.png"}, {HALF: HALF}, {"type": "image", "image": "a.png"}, [["a"] * 50] * 3,
    "assistant", "system", 3.0,
]  # fmt: skip
MORE_KEYS = ["image", "images", "video", "videos", "label", "group", "answer", "answers", "system", "tools", "weight",
             "id", "audio", "objects", "history", "loss", HALF, "", "\x1b", "image_path", "type", "role",
             "content"]  # fmt: skip


def mutate(value: Any, random: Random) -> Any:
    """A value with one to three of its parts replaced, removed, doubled or added to."""
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _mutate_once(value, random)
    return value


def _mutate_once(value: Any, random: Random, depth: int = 0) -> Any:
    draw = random.random()
    if depth and (draw < 0.15 or not isinstance(value, dict | list)):
        if isinstance(value, str) and draw < 0.5:
            place = random.randrange(len(value) + 1)
            return value[:place] + random.choice(TEXTS)[:3000] + value[place:]
        return random.choice(VALUES)
    if isinstance(value, list):
        items = list(value)
        place = random.randrange(len(items) + 1)
        if draw < 0.3 or place == len(items):
            items.insert(place, random.choice([*VALUES, *items]))
        elif draw < 0.45:
            del items[place]
        else:
            items[place] = _mutate_once(items[place], random, depth + 1)
        return items
    if not isinstance(value, dict):
        return random.choice(VALUES)
    fields = dict(value)
    key = random.choice(list(fields) or [""])
    if draw < 0.3 or key not in fields:
        fields[random.choice(MORE_KEYS)] = random.choice(VALUES)
    elif draw < 0.4:
        del fields[key]
    else:
        fields[key] = _mutate_once(fields[key], random, depth + 1)
    return fields


def check_message(error: Exception) -> None:
    """A message of a few lines that files and terminals take."""
    text = str(error)
    assert len(text) <= MAX_CHARACTERS, text[:300]
    text.encode()
    assert CONTROLS.isdisjoint(presentable(text))


@pytest.fixture(scope="module")
def sources(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Format -> a source of that format, beside a folder with `a.png`."""
    root = tmp_path_factory.mktemp("records")
    (root / "images").mkdir()
    picture().save(root / "images" / "a.png")
    encoder = SampleEncoder(parts.processor(), 400, truncate=False)
    prompts = PromptEncoder(encoder.processor, 400, truncate=False)
    encoders = {
        "labelled": prompts, "pair": PairEncoder(encoder.processor, 400, truncate=False),
        "preference": PreferenceEncoder(encoder.processor, 400, truncate=False),
    }  # fmt: skip
    made = {}
    for name in FORMATS:
        config = SourceConfig(path=str(root / "x.jsonl"), format=name, image_folder=str(root / "images"))
        made[name] = Source(name, config, root / "cache", encoders.get(name, encoder), 4)
    return made


def sized(numbers: dict[str, int]) -> pytest.MarkDecorator:
    """The short form, and the long one, which is an attack."""
    return pytest.mark.parametrize(
        "numbers",
        [range(numbers["short"]), pytest.param(range(numbers["short"], numbers["long"]), marks=pytest.mark.attack)],
        ids=numbers,
    )


@sized(NUM_RECORDS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_record_is_encoded_or_a_bad_sample(sources: dict[str, Source], name: str, numbers: range):
    source, used = sources[name], 0
    for number in numbers:
        record = mutate(RECORDS[name], Random(f"{SEED}.{name}.{number}"))
        try:
            sample = source.read(record)
            json.dumps([sample.id, sample.label, sample.references], default=str, ensure_ascii=False).encode()
            encode_sample(source, sample)
            used += 1
        except BadSample as error:
            check_message(error)
            skipped = Skipped.from_error(error, source, number)
            json.dumps(vars(skipped), ensure_ascii=False).encode()
            check_message(skipped.as_error())
    assert used < len(numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_the_records_that_are_mutated_are_good(sources: dict[str, Source], name: str):
    source = sources[name]
    assert encode_sample(source, source.read(RECORDS[name]))["input_ids"]


def test_the_secrets_of_an_address_are_not_listed(sources: dict[str, Source]):
    address = "https://host.org/a.tar?token=hush1234"
    error = BadSample("?", f"{address} stopped: HTTP Error 403", address)
    skipped = Skipped.from_error(error, sources["llava"])
    assert "hush" not in json.dumps(vars(skipped))
    assert "HTTP Error 403" in skipped.reason


ROWS = [{"id": str(number), "question": "what?", "answer": f"line, {number}"} for number in range(5)]


def _json(file: Path) -> None:
    file.write_text(json.dumps(ROWS))


def _jsonl(file: Path) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))


def _csv(file: Path) -> None:
    separator = "\t" if file.suffix == ".tsv" else ","
    lines = [separator.join(ROWS[0]), *(separator.join(f'"{cell}"' for cell in row.values()) for row in ROWS)]
    file.write_text("\n".join(lines))


def _parquet(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), file)


def _tar(file: Path) -> None:
    with tarfile.open(file, "w") as archive:
        for number, row in enumerate(ROWS):
            content = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(content)
            archive.addfile(info, BytesIO(content))


FILES: dict[str, Callable[[Path], None]] = {
    "a.json": _json, "a.jsonl": _jsonl, "a.csv": _csv, "a.tsv": _csv, "a.parquet": _parquet, "a.tar": _tar,
}  # fmt: skip
PIECES = [b"", b"\0", b"\xff", b'"', b"\\ud83d", b"\xed\xa0\xbd", b"{", b"[" * 3000, b"\n", b",", b"1e999", b"\x1b[2J",
          b"9" * 5000, b"\xef\xbb\xbf", b"\xff\xfe", b"\t" * 50, b"PAR1", b'":{"' * 200, b"\r", b"NaN"]  # fmt: skip


def damage(content: bytes, random: Random) -> bytes:
    """Bytes with one to four pieces replaced, removed or cut off."""
    damaged = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(damaged) + 1)
        damaged[place : place + random.choice((0, 1, 4, 60))] = random.choice(PIECES)
    return bytes(damaged[: random.randrange(len(damaged) + 1)] if random.random() < 0.1 else damaged)


@pytest.fixture
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@sized(NUM_FILES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(name: str, numbers: range, tmp_path: Path, quiet: None):
    FILES[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for number in numbers:
        file = tmp_path / f"{number}" / name
        file.parent.mkdir()
        file.write_bytes(damage(content, Random(f"{SEED}.{name}.{number}")))
        try:
            for record in stream_records(str(file), tmp_path / "cache"):
                if isinstance(record, BadSample):
                    check_message(record)
        except ValueError as error:
            check_message(ValueError(presentable(error)))
