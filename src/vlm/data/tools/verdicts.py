"""The verdict on each record says whether it can be used, and has digests by which duplicates are found.

Records are checked in parallel, in order; `clean` acts on the verdicts. To add a reason, add it to `REASONS` and
return it in `RecordChecker`.
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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from PIL import Image, ImageOps

from vlm.config.named import permit_names
from vlm.data.processes import num_cores
from vlm.data.records.formats import get_reader
from vlm.data.records.open import Records, open_records
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn, VideoRef
from vlm.data.usable import RecordReader, check_reply
from vlm.data.vision.images import is_uniform, open_image
from vlm.data.vision.similarity import sketch_image
from vlm.data.vision.video import num_frames

REASONS = {
    "refused": "not a record of this format, or a file is missing",
    "silent": "no reply to train on: it is missing or blank",
    "broken": "an image or video that does not decode",
    "small": "an image with a side below --min-side",
    "narrow": "an image longer than --max-aspect allows",
    "duplicate": "the same as an earlier record, see --duplicates",
    "near": "a near copy of an earlier record, see --near-duplicates",
}
"""Reason for leaving out a record -> its description."""
RECORDS_PER_CHUNK = 16
"""Number of records that a worker checks at a time."""
CHUNKS_AHEAD = 4
"""Number of chunks for each worker that are submitted ahead of the results."""
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
"""Modes of images that are converted to RGBA without loss."""
HASHED_ROWS = 256
"""Number of rows of pixels that are hashed at a time, so that a large image is not copied as a whole."""


@dataclass(frozen=True)
class CleanTask:
    """The records to clean, and the rules; the command's options have the same names.

    Attributes:
        source: the records, as `records.open.open_records` takes them.
        cache: the cache's folder.
        image_folder: the folder that paths are relative to; empty for the folder of `source`.
        format: a name of `FORMATS`, or `package.module:function`.
        options: the reader's keyword parameters, each as `name=value`.
        split: of a data set that has several.
        subset: subset to read, of a data set on the Hub that has several.
        min_side: the fewest pixels of an image's side.
        max_aspect: the largest ratio of an image's sides; None for any.
        follow_links: whether links that lead out of the image folder are followed.
        near_duplicates: whether images are sketched, so that near copies are found.
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
    follow_links: bool = False
    near_duplicates: bool = False

    @property
    def folder(self) -> Path:
        """The image folder."""
        place = Path(self.source)
        return Path(self.image_folder or (place if place.is_dir() else place.parent))

    def records(self) -> Records:
        """Open the records."""
        where = {"split": self.split, "subset": self.subset}
        return open_records(self.source, self.cache, **where, follow_links=self.follow_links)

    def reader(self) -> partial[Sample]:
        """Return the reader of the format with its options; ValueError if there is none, or no such option."""
        permit_names([self.format])  # in each process: it is the command's --format
        read = get_reader(self.format)
        options = dict(map(parse_option, self.options))
        try:
            inspect.signature(read).bind(None, self.folder, **options)
        except TypeError as error:
            known = ", ".join(list(inspect.signature(read).parameters)[2:]) or "none"
            raise ValueError(f"--option: {error}; --format {self.format} has {known}") from None
        return partial(read, **options)


@dataclass(frozen=True)
class RecordVerdict:
    """Whether a record can be used; journals hold these fields under their names.

    Attributes:
        reason: a key of `REASONS`; None for a record that can be used.
        detail: what exactly is wrong.
        file: the file at fault.
        digest: of text and images, 32 hexadecimal digits.
        images: the digest of each image and video.
        uniform: number of images of one colour throughout.
        text: the digest of the text alone, where images are sketched.
        sketches: of each image, see `vision.similarity`, where images are sketched; None for a video.
        names: of each image and video, likewise.
    """

    id: str
    reason: str | None = None
    detail: str | None = None
    file: str | None = None
    digest: str = ""
    pictures: Sequence[str] = ()
    uniform: int = 0
    text: str = ""
    sketches: Sequence[str | None] = ()
    names: Sequence[str] = ()


class RecordChecker:
    """Checks records by index: whether the reader takes them, their replies, and all pixels of their images."""

    def __init__(self, task: CleanTask, records: Records):
        self.task, self.records = task, records
        options = dict(map(parse_option, task.options))
        self._read = RecordReader(task.reader(), task.folder, task.format, options, task.follow_links, "clean")

    def __call__(self, number: int) -> RecordVerdict:
        """Return the verdict on the record at an index."""
        try:
            sample = self._read(self.records[number])
        except BadSample as error:
            return RecordVerdict(error.sample_id, "refused", error.reason, error.file)
        try:
            needs_reply = sample.label is None or any(turn.role == "assistant" for turn in sample.turns)
            check_reply(sample, needed=needs_reply)
        except BadSample as error:
            return RecordVerdict(sample.id, "silent", error.reason)
        digests: list[str] = []
        sketches: list[str | None] = []
        uniform = 0
        try:
            for image_ref in sample.images:
                image = open_image(image_ref, sample.id)
                file = None if image_ref.path is None else str(image_ref.path)
                if reason := self._shape_problem(image):
                    size = "{} x {}".format(*image.size)
                    return RecordVerdict(sample.id, reason, f"image {image_ref} is {size} pixels", file)
                try:
                    digests.append(image_pixel_digest(image))
                    uniform += _shows_one_colour(image)
                    if self.task.near_duplicates:
                        sketches.append(sketch_image(image).to_text())
                except Exception as error:  # Pillow reads the orientation only now, and may raise anything
                    detail = f"image {image_ref} cannot be turned upright and converted to RGB: {error}"
                    return RecordVerdict(sample.id, "broken", detail, file)
            digests += [video_file_digest(video, sample.id) for video in sample.videos]
        except BadSample as error:
            return RecordVerdict(sample.id, "broken", error.reason, error.file)
        verdict = RecordVerdict(sample.id, digest=sample_digest(sample, digests), pictures=digests, uniform=uniform)
        if not self.task.near_duplicates:
            return verdict
        sketches += [None] * len(sample.videos)
        names = [str(ref) for ref in sample.images] + [str(video.path) for video in sample.videos]
        return replace(verdict, text=sample_digest(sample, ()), sketches=sketches, names=names)

    def _shape_problem(self, image: Image.Image) -> str | None:
        short, long = sorted(image.size)
        if short < self.task.min_side:
            return "small"
        if self.task.max_aspect is not None and long > self.task.max_aspect * short:
            return "narrow"
        return None


def _shows_one_colour(image: Image.Image) -> bool:
    """Return whether an image, which has been decoded, is of one colour throughout once it is in RGB."""
    if image.mode != "RGB" or "transparency" in image.info:
        from vlm.models.pixels import as_rgb  # transformers comes with it, which most images do not need

        image = as_rgb(image)
    return is_uniform(image)


def image_pixel_digest(image: Image.Image) -> str:
    """Return the digest of an image's upright pixels, which does not change when it is saved in another format."""
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    mode = "RGBA" if image.mode in EIGHT_BIT_MODES else image.mode
    digest = hashlib.blake2b(f"{mode} {width} x {height}".encode(), digest_size=16)
    for top in range(0, height, HASHED_ROWS):
        strip = image.crop((0, top, width, min(top + HASHED_ROWS, height)))
        digest.update((strip if strip.mode == mode else strip.convert(mode)).tobytes())
    return digest.hexdigest()


def video_file_digest(video: VideoRef, sample_id: str) -> str:
    """Return the digest of a video's file, which must have frames; decoding every frame would take too long.

    For frames that were extracted beforehand, it is the digest of their pixels, so each of them must decode.
    """
    if video.frames:
        digests = [image_pixel_digest(open_image(frame, sample_id)) for frame in video.frames]
        return hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest()
    num_frames(video.path, sample_id)
    with video.path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sample_digest(sample: Sample, images: Sequence[str]) -> str:
    """Return the digest of a sample's roles and texts, the places of its images and videos, and their digests.

    Tools, calls, thinking and weights are part of it where there are any.
    """
    kinds = {ImageRef: "Picture", VideoRef: "Video"}  # as in journals that exist
    turns = [
        (turn.role, [part if isinstance(part, str) else [kinds[type(part)]] for part in turn.content])
        + (() if turn.supervised or turn.is_blank else ("not learned",))
        + ((list(turn.tool_calls),) if isinstance(turn, ToolCallTurn) else ())
        + (() if turn.thinking is None and turn.weight == 1 else (turn.thinking, turn.weight))
        for turn in sample.turns
    ]
    whole = [turns, list(images), *([list(sample.tools)] if sample.tools else [])]
    return hashlib.blake2b(json.dumps(whole).encode(), digest_size=16).hexdigest()


def check_records(task: CleanTask, records: Records, first: int, workers: int | None) -> Iterator[RecordVerdict]:
    """Iterate over the verdicts of the records from the index `first` on, in order."""
    number = min(num_cores() if workers is None else workers, -(-(len(records) - first) // RECORDS_PER_CHUNK))
    if number < 2:
        yield from map(RecordChecker(task, records), range(first, len(records)))
        return
    submitted: deque[Future[list[RecordVerdict]]] = deque()
    done = first
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=exit_with_parent)
    try:
        for start in range(first, len(records), RECORDS_PER_CHUNK):
            chunk = range(start, min(start + RECORDS_PER_CHUNK, len(records)))
            submitted.append(pool.submit(check_record_chunk, task, records.fingerprint, chunk))
            while len(submitted) > CHUNKS_AHEAD * number or (submitted and chunk.stop == len(records)):
                verdicts = submitted.popleft().result()
                done += len(verdicts)
                yield from verdicts
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker was killed at record {done} or soon after it, which happens when memory runs out. The same "
            f"command continues from there; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_record_chunk(task: CleanTask, fingerprint: str, chunk: range) -> list[RecordVerdict]:
    """Return the verdicts of some records, in a worker."""
    checker = _open_checker(task)
    if checker.records.fingerprint != fingerprint:
        raise ValueError(f"{task.source} changed while it was read; run it again")
    return [checker(index) for index in chunk]


@lru_cache(maxsize=1)
def _open_checker(task: CleanTask) -> RecordChecker:
    """Open the records, once in each worker."""
    return RecordChecker(task, task.records())


def exit_with_parent() -> None:
    """End a worker with its parent, even a killed one, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        """End this process when its parent has ended."""
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parse_option(text: str) -> tuple[str, object]:
    """Parse `name=value`, the value as JSON where it is JSON, else as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
