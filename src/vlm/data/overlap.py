"""Overlap of training with evaluation data: images by their bytes and by how they look, texts by their words.

`scan` reads records once, `find_overlap` compares those of training with those of evaluation, and `check_overlap` does
both for a run, as `dataset.overlap` says. Frames of videos are not compared.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from vlm.config.dataset_schema import DatasetConfig
from vlm.data.cache import create_once, json_digest
from vlm.data.processes import num_cores
from vlm.data.sample import BadSample, ImageRef, Sample
from vlm.data.sources import Source
from vlm.data.vision.images import open_image, wrap_image_errors
from vlm.data.vision.similarity import ImageSketch, SketchIndex, sketch_image

log = logging.getLogger(__name__)

NUM_GRAM_WORDS = 13
"""Words in a row of a reply that two records share only if one is a copy of the other; as GPT-3's authors compared
(Brown et al. 2020, arXiv:2005.14165, appendix C)."""
MAX_EXAMPLES = 5
"""Examples of each kind of overlap."""
FORMAT_VERSION = 1
RECORDS_AHEAD = 64


class ScannedImage(NamedTuple):
    """An image: its name for people, a digest of its bytes, and what it looks like."""

    name: str
    digest: bytes
    sketch: ImageSketch


class ScannedRecord(NamedTuple):
    """A record: where it is, its images, and digests of its texts, by which equal ones are found."""

    place: str
    images: Sequence[ScannedImage]
    texts: frozenset[bytes]


@dataclass
class Overlap:
    """How many records of evaluation are in the training data too.

    Attributes:
        evaluated: number of evaluation records that were compared.
        compared: number of training records that they were compared with.
        same_image: of them, those with an image whose file is one of training, byte for byte.
        near_image: those, of the others, with an image that looks like one of training.
        same_text: those with a text of training: `NUM_GRAM_WORDS` words of a reply in a row, or without any image the
            whole conversation.
        examples: a line for each of the first of each kind.
    """

    evaluated: int
    compared: int
    same_image: int = 0
    near_image: int = 0
    same_text: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def is_any(self) -> bool:
        """Whether any evaluation record is in the training data."""
        return bool(self.same_image or self.near_image or self.same_text)

    def __str__(self) -> str:
        """Return the counts in one sentence."""
        return (
            f"of {self.evaluated:,} evaluation records, {self.same_image:,} share an image with the training data, "
            f"{self.near_image:,} have a near copy of one, and {self.same_text:,} share a text"
        )


class Placed(Protocol):
    """Samples with their sources: `places` is `(samples, 2)`, the index of the source and of the record."""

    @property
    def sources(self) -> list[Source]:
        """Where the samples come from."""
        ...

    @property
    def places(self) -> np.ndarray:
        """The source and record of each sample."""
        ...


def scan(source: Source, records: Sequence[int] | np.ndarray) -> Iterator[ScannedRecord]:
    """Read records of a source by their indices, in order; those that cannot be used are left out."""
    numbers = [int(number) for number in records]
    bar = tqdm(total=len(numbers), desc=f"comparing {source.name}", unit="record", disable=None, leave=False)
    with ThreadPoolExecutor(num_cores()) as pool, bar:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(numbers), RECORDS_AHEAD):
            chunk = numbers[start : start + RECORDS_AHEAD]
            yield from filter(None, pool.map(lambda number: _scan_record(source, number), chunk))
            bar.update(len(chunk))


def _scan_record(source: Source, number: int) -> ScannedRecord | None:
    try:
        sample = source.parse(source.records[number])
        images = [_scan_image(ref, sample.id) for ref in sample.images if ref.frame is None]
    except BadSample:
        return None
    return ScannedRecord(f"{source.name}, record {number} ({sample.id})", images, text_digests(sample))


def _scan_image(ref: ImageRef, sample_id: str) -> ScannedImage:
    if ref.content is None:
        assert ref.path is not None
        with wrap_image_errors(ref, sample_id):
            content = Path(ref.path).read_bytes()
    else:
        content = ref.content
    digest = hashlib.blake2b(content, digest_size=16).digest()
    image = open_image(ImageRef(ref.path, content), sample_id)
    with wrap_image_errors(ref, sample_id):
        return ScannedImage(str(ref), digest, sketch_image(image))


def text_digests(sample: Sample) -> frozenset[bytes]:
    """Return digests of the texts of a sample by which it is recognised: of words in lower case, without punctuation.

    They are those of all `NUM_GRAM_WORDS` words in a row of its replies, and without images or videos that of the whole
    conversation: a short question about an image is often asked about another one too.
    """
    grams: set[bytes] = set()
    for turn in sample.turns:
        if turn.role == "assistant":
            words = _words(part for part in turn.content if isinstance(part, str))
            starts = range(len(words) - NUM_GRAM_WORDS + 1)
            grams.update(_digest(words[start : start + NUM_GRAM_WORDS]) for start in starts)
    if not sample.media:
        parts = [part for turn in sample.turns if turn.role != "system" for part in turn.content]
        grams.add(_digest(["whole", *_words(part for part in parts if isinstance(part, str))]))
    return frozenset(grams)


def _words(texts: Iterable[str]) -> list[str]:
    return re.findall(r"\w+", " ".join(texts).casefold())


def _digest(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=12).digest()


def find_overlap(training: Iterable[ScannedRecord], evaluation: Sequence[ScannedRecord]) -> Overlap:
    """Compare records of training, one after the other, with those of evaluation, which are in memory."""
    by_digest: dict[bytes, list[int]] = {}
    by_text: dict[bytes, list[int]] = {}
    index, owners = SketchIndex(), list[int]()
    for number, record in enumerate(evaluation):
        for image in record.images:
            by_digest.setdefault(image.digest, []).append(number)
            index.add(image.sketch)
            owners.append(number)
        for text in record.texts:
            by_text.setdefault(text, []).append(number)
    same: dict[int, str] = {}
    near: dict[int, str] = {}
    texts: dict[int, str] = {}
    compared = 0
    for record in training:
        compared += 1
        for image in record.images:
            for number in by_digest.get(image.digest, ()):
                same.setdefault(number, f"shares the image {image.name} with {record.place}")
            if image.digest not in by_digest and (nearest := index.find(image.sketch)) is not None:
                near.setdefault(owners[nearest], f"has a near copy of {image.name} in {record.place}")
        for text in record.texts & by_text.keys():
            for number in by_text[text]:
                texts.setdefault(number, f"shares a text with {record.place}")
    near = {number: told for number, told in near.items() if number not in same}
    kinds = [list(kind.items())[:MAX_EXAMPLES] for kind in (same, near, texts)]
    examples = [f"{evaluation[number].place} {told}" for kind in kinds for number, told in kind]
    return Overlap(len(evaluation), compared, len(same), len(near), len(texts), examples)


def check_overlap(config: DatasetConfig, training: Placed, evaluation: Placed | None) -> None:
    """Compare the training and evaluation records of a run, as `dataset.overlap` says; the result is cached.

    Raises:
        ValueError: they overlap, and `dataset.overlap` is `refuse`.
    """
    if config.overlap == "allow" or evaluation is None:
        return
    overlap = _cached_overlap(training, evaluation)
    if not overlap.is_any:
        log.info("Overlap: no evaluation record was found in the training data")
        return
    told = f"dataset.overlap={config.overlap}: {overlap}"
    if config.overlap == "refuse":
        first = f"the first: {overlap.examples[0]}"
        raise ValueError(f"{told}; {first}. Remove them, or train with dataset.overlap=warn")
    log.warning("%s. Such as:\n%s", told, "\n".join(f"  {example}" for example in overlap.examples))


def _cached_overlap(training: Placed, evaluation: Placed) -> Overlap:
    """Return the overlap from the cache, or find it; ranks that start together wait for the one that does."""
    parts = [_records_by_source(data) for data in (training, evaluation)]
    digests = [
        [(source.fingerprint, hashlib.sha256(records.tobytes()).hexdigest()) for source, records in part]
        for part in parts
    ]

    def write(partial: Path) -> None:
        """Find the overlap and write it as JSON."""
        records, evaluated = ((one for source, numbers in part for one in scan(source, numbers)) for part in parts)
        partial.write_text(json.dumps(asdict(find_overlap(records, list(evaluated)))), encoding="utf-8")

    path = training.sources[0].cache / "overlap" / f"{json_digest(FORMAT_VERSION, digests)}.json"
    return Overlap(**json.loads(create_once(path, write).read_text(encoding="utf-8")))


def _records_by_source(data: Placed) -> list[tuple[Source, np.ndarray]]:
    """Return the records of each source that samples are made of, each once."""
    found = []
    for number, source in enumerate(data.sources):
        places = data.places[data.places[:, 0] == number, 1]
        found.append((source, np.unique([source.record_of(place) for place in places.tolist()]).astype(np.int64)))
    return found


@dataclass
class NearCopies:
    """Images that look like an earlier one: how many of how many different files, and examples."""

    images: int = 0
    copies: int = 0
    examples: list[str] = field(default_factory=list)


def find_near_copies(records: Iterable[ScannedRecord]) -> NearCopies:
    """Find the images that look like an earlier one of these records; equal files count once."""
    index, names = SketchIndex(), list[str]()
    seen: set[bytes] = set()
    found = NearCopies()
    for record in records:
        for image in record.images:
            if image.digest in seen:
                continue
            seen.add(image.digest)
            found.images += 1
            if (earlier := index.find(image.sketch)) is None:
                index.add(image.sketch)
                names.append(image.name)
                continue
            found.copies += 1
            if len(found.examples) < MAX_EXAMPLES:
                found.examples.append(f"{image.name} looks like {names[earlier]}")
    return found
