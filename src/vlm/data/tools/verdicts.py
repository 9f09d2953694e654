"""A verdict on each record: whether it can be used, and digests by which those that say the same again are found.

Records are looked at in parallel, in order; `clean` acts on the verdicts. To add a reason, add it to `REASONS` and
find it in `Checker`.
"""

import hashlib
import inspect
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlm.data.processes import num_cores
from vlm.data.records.formats import get_reader
from vlm.data.records.open import Records, open_records
from vlm.data.sample import BadSample, ImageRef, Sample, VideoRef
from vlm.data.vision.images import open_image
from vlm.data.vision.video import num_frames

REASONS = {
    "refused": "no record of this format, or a file that it names is not there",
    "silent": "no reply with anything but blanks",
    "broken": "a picture or video that does not decode",
    "small": "a picture with a side below --min-side",
    "narrow": "a picture of a shape beyond --max-aspect",
    "duplicate": "the same as an earlier record, see --duplicates",
}
"""Why a record is left out."""
RECORDS_PER_CHUNK = 16
"""Records that a worker looks at before it hands over what it found."""
CHUNKS_AHEAD = 4
"""Chunks for each worker that are under way or wait to be taken in order."""
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
"""Modes of pictures that lose nothing as RGBA."""
HASHED_ROWS = 256
"""Rows of pixels that are hashed at a time, so that a large picture is not copied whole."""


@dataclass(frozen=True)
class CleanTask:
    """What is cleaned, and by which rules.

    Attributes:
        source: the records, as `data.files.open_records` takes them.
        cache: the cache's folder.
        image_folder: what their paths are relative to; empty: the folder of `source`.
        format: a name of `FORMATS`, or `package.module:function`.
        options: the reader's keyword parameters, each as `name=value`.
        split: of a data set that has several.
        subset: of a data set on the Hub that has several.
        min_side: fewest pixels of a picture's side.
        max_aspect: largest ratio of a picture's sides; None: any.
    """

    source: str
    cache: Path
    image_folder: str = ""
    format: str = "llava"
    options: tuple[str, ...] = ()
    split: str = "train"
    subset: str | None = None
    min_side: int = 28
    max_aspect: float | None = None

    @property
    def folder(self) -> Path:
        """The image folder."""
        place = Path(self.source)
        return Path(self.image_folder or (place if place.is_dir() else place.parent))

    def records(self) -> Records:
        """The records, opened."""
        return open_records(self.source, self.cache, split=self.split, subset=self.subset)

    def reader(self) -> partial[Sample]:
        """The reader of the format with its options.

        Raises:
            ValueError: there is no such reader, or it has no such option.
        """
        read = get_reader(self.format)
        options = dict(_parse_option(text) for text in self.options)
        try:
            inspect.signature(read).bind(None, self.folder, **options)
        except TypeError as error:
            known = ", ".join(list(inspect.signature(read).parameters)[2:]) or "none"
            raise ValueError(f"--option: {error}; --format {self.format} has {known}") from None
        return partial(read, **options)


@dataclass(frozen=True)
class RecordVerdict:
    """What became of a record.

    Attributes:
        id: its own name.
        reason: a key of `REASONS`; None: it can be used.
        detail: what exactly is wrong with it.
        file: the file at fault.
        digest: of its text and its pictures, 32 hexadecimal digits.
        pictures: digest of each picture and video.
    """

    id: str
    reason: str | None = None
    detail: str | None = None
    file: str | None = None
    digest: str = ""
    pictures: Sequence[str] = ()


class RecordChecker:
    """Looks at records by number: what the reader refuses, replies, and pictures down to their last pixel."""

    def __init__(self, task: CleanTask, records: Records):
        self.task, self.records = task, records

    @cached_property
    def _read(self) -> partial[Sample]:
        return self.task.reader()

    def __call__(self, number: int) -> RecordVerdict:
        """The verdict on a record."""
        try:
            sample = self._sample(number)
        except BadSample as error:
            return RecordVerdict(error.sample_id, "refused", error.reason, error.file)
        replies = [part for turn in sample.turns if turn.role == "assistant" for part in turn.content]
        if not any(isinstance(part, str) and part.strip() for part in replies):
            return RecordVerdict(sample.id, "silent", "its replies are blank")
        digests: list[str] = []
        try:
            for image_ref in sample.images:
                image = open_image(image_ref, sample.id)
                if found := self._check_image_shape(image, image_ref, sample.id):
                    return found
                digests.append(self._image_digest(image, image_ref, sample.id))
            digests += [video_file_digest(video, sample.id) for video in sample.videos]
        except BadSample as error:
            return RecordVerdict(sample.id, "broken", error.reason, error.file)
        return RecordVerdict(sample.id, digest=sample_digest(sample, digests), pictures=digests)

    def _sample(self, number: int) -> Sample:
        record = self.records[number]
        try:
            return self._read(record, self.task.folder)
        except BadSample:
            raise
        except Exception as error:  # whatever a reader of the user's own trips over belongs to this record
            name = str(record.get("id", "?")) if isinstance(record, dict) else "?"
            raise BadSample(name, f"its reader raised {type(error).__name__}: {error}") from error

    def _check_image_shape(self, image: Image.Image, image_ref: ImageRef, sample_id: str) -> RecordVerdict | None:
        file = None if image_ref.path is None else str(image_ref.path)
        size, (short, long) = "{} x {}".format(*image.size), sorted(image.size)
        if short < self.task.min_side:
            return RecordVerdict(sample_id, "small", f"image {image_ref} is {size} pixels", file)
        if self.task.max_aspect is not None and long > self.task.max_aspect * short:
            return RecordVerdict(sample_id, "narrow", f"image {image_ref} is {size} pixels", file)
        return None

    def _image_digest(self, image: Image.Image, image_ref: ImageRef, sample_id: str) -> str:
        try:
            return image_pixel_digest(image)
        except Exception as error:  # Pillow reads a picture's orientation only now, and what it raises is not closed
            file = None if image_ref.path is None else str(image_ref.path)
            raise BadSample(sample_id, f"image {image_ref} does not turn upright: {error}", file) from error


def image_pixel_digest(image: Image.Image) -> str:
    """Of the pixels as they are shown, so that a picture which is saved again in another way counts as the same."""
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    mode = "RGBA" if image.mode in EIGHT_BIT_MODES else image.mode
    digest = hashlib.blake2b(f"{mode} {width} x {height}".encode(), digest_size=16)
    for top in range(0, height, HASHED_ROWS):
        strip = image.crop((0, top, width, min(top + HASHED_ROWS, height)))
        digest.update((strip if strip.mode == mode else strip.convert(mode)).tobytes())
    return digest.hexdigest()


def video_file_digest(video: VideoRef, sample_id: str) -> str:
    """Of a video's file, since decoding every frame takes too long; that it opens and has frames is looked at.

    Raises:
        BadSample: it does not, or has none.
    """
    num_frames(video.path, sample_id)
    with video.path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sample_digest(sample: Sample, pictures: Sequence[str]) -> str:
    """Of who says what, where pictures and videos stand in it, and which they are."""
    turns = [
        (turn.role, [part if isinstance(part, str) else [type(part).__name__] for part in turn.content])
        for turn in sample.turns
    ]
    return hashlib.blake2b(json.dumps([turns, list(pictures)]).encode(), digest_size=16).hexdigest()


def check_records(task: CleanTask, records: Records, first: int, workers: int | None) -> Iterator[RecordVerdict]:
    """The verdicts of the records from the `first` on, in order."""
    number = min(num_cores() if workers is None else workers, -(-(len(records) - first) // RECORDS_PER_CHUNK))
    if number < 2:
        yield from map(RecordChecker(task, records), range(first, len(records)))
        return
    waiting: deque[Future[list[RecordVerdict]]] = deque()
    done = first
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=exit_with_parent)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            for start in range(first, len(records), RECORDS_PER_CHUNK):
                chunk = range(start, min(start + RECORDS_PER_CHUNK, len(records)))
                waiting.append(pool.submit(check_record_chunk, task, records.fingerprint, chunk))
                while len(waiting) > CHUNKS_AHEAD * number or (waiting and chunk.stop == len(records)):
                    found = waiting.popleft().result()
                    done += len(found)
                    yield from found
        except BrokenProcessPool as error:
            raise ValueError(
                f"a worker was killed at record {done} or soon after it, as happens where memory runs out: the same "
                f"command goes on from there, with fewer --workers if need be"
            ) from error


def check_record_chunk(task: CleanTask, fingerprint: str, chunk: range) -> list[RecordVerdict]:
    """The verdicts of some records, in a worker."""
    checker = _open_checker(task)
    if checker.records.fingerprint != fingerprint:
        raise ValueError(f"{task.source} changed while it was read; run it again")
    return [checker(index) for index in chunk]


@lru_cache(maxsize=1)
def _open_checker(task: CleanTask) -> RecordChecker:
    """A worker opens the records once."""
    return RecordChecker(task, task.records())


def exit_with_parent() -> None:
    """Let a worker end with its parent, even a killed one, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _parse_option(text: str) -> tuple[str, Any]:
    """A parameter's name and value: JSON where the value is JSON, else a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
