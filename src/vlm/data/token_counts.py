"""Counts of each record's tokens: made once, in parallel, before anything trains, and kept in the cache.

Records that cannot be used are found here too, as far as possible without decoding every image.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset

from vlm.data.cache import create_once, json_digest
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.encoding.plain_counts import TokenCounts, make_plain_counter
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.encoding.thinking import is_thinking_asked
from vlm.data.processes import num_cores
from vlm.data.processor import Processor
from vlm.data.progress import show_progress
from vlm.data.sample import BadSample, MediaSize, Sample, Turn
from vlm.data.sources import Source
from vlm.data.usable import check_reply
from vlm.data.vision.images import is_uniform, open_media, read_image_size, read_media_sizes
from vlm.data.vision.video import DecodedVideo

SCHEMA = pa.schema(
    [
        ("record", pa.int64()), ("length", pa.int32()), ("needed", pa.int32()), ("supervised", pa.int32()),
        ("replies", pa.int32()), ("images", pa.int32()), ("videos", pa.int32()), ("width", pa.int32()),
        ("height", pa.int32()), ("uniform", pa.int32()), ("thinking", pa.int32()), ("label", pa.string()),
        ("group", pa.string()), ("id", pa.string()), ("problem", pa.string()), ("file", pa.string()),
    ]
)  # fmt: skip
INTEGER_COLUMNS = SCHEMA.names[:11]
CHUNK = 512
FEW = 1024
"""Up to this many records are counted faster in this process than in workers that have to start."""

REMEMBERED = 8192
"""Number of conversations whose counts a process remembers."""
LONGEST_REMEMBERED = 2048
"""Most characters of such a conversation."""

CountedRow = tuple[object, ...]
"""A row of `SCHEMA`."""


@dataclass(frozen=True)
class Counts:
    """Counts of records: arrays with an entry for each record, read from disk as they are used.

    Attributes:
        record: its index in the source.
        length: number of tokens, image tokens included; 0 for a record that cannot be used.
        needed: the fewest tokens that it may be cut to: up to its last image or video, and its first supervised token.
        supervised: number of supervised tokens.
        replies: number of replies that are trained on.
        images: number of images and videos; every frame of a video that is read as images.
        videos: number of those that the model reads as videos.
        width, height: of the first image in pixels; 0 if it has none, or a frame of a video.
        uniform: number of its images, of those that were decoded, that are of one colour throughout.
        thinking: 1 if a reply after its last question has thinking that is read, else 0.
        labels: its label for prediction heads as JSON; null without one, or where labels are not read.
        groups: the group within which a ranking compares it; null under the same conditions.
        problems: place in these arrays -> why the record cannot be used.
        ids: the names that records give themselves.
    """

    record: np.ndarray
    length: np.ndarray
    needed: np.ndarray
    supervised: np.ndarray
    replies: np.ndarray
    images: np.ndarray
    videos: np.ndarray
    width: np.ndarray
    height: np.ndarray
    uniform: np.ndarray
    thinking: np.ndarray
    labels: pa.ChunkedArray
    groups: pa.ChunkedArray
    problems: dict[int, BadSample]
    ids: pa.ChunkedArray

    def join(self, other: "Counts") -> "Counts":
        """Return these counts, and others after them."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in INTEGER_COLUMNS}
        problems = {**self.problems, **{len(self.record) + place: error for place, error in other.problems.items()}}
        return Counts(
            **columns,
            labels=pa.chunked_array([*self.labels.chunks, *other.labels.chunks], pa.string()),
            groups=pa.chunked_array([*self.groups.chunks, *other.groups.chunks], pa.string()),
            problems=problems,
            ids=pa.chunked_array([*self.ids.chunks, *other.ids.chunks], pa.string()),
        )

    def labels_and_groups_at(self, places: np.ndarray) -> tuple[list[object], list[str | None]]:
        """Return the labels and groups of the records at some places; None for a record without one."""
        rows = pa.array(places)
        texts = self.labels.take(rows).to_pylist()
        return [None if text is None else json.loads(text) for text in texts], self.groups.take(rows).to_pylist()


def count(
    source: Source,
    records: np.ndarray,
    decode: int | None,
    workers: int | None,
    on_problem: Callable[[int, BadSample], object] = lambda number, problem: None,
) -> Counts:
    """Count the records at some indices, in order, or read the counts from the cache.

    Records that could not be used before are counted again: a missing image may be there now.

    Args:
        source: the source.
        records: the indices of the records, in order.
        decode: the number of records, from the first on, whose images are decoded; None for all.
        workers: number of processes; None for one a core.
        on_problem: called for each record that cannot be used, as soon as it is found; if it raises, the counts up
            to there are kept.
    """
    path = counts_file(source, records, decode)
    was_cached = path.exists()
    num_decoded = len(records) if decode is None else decode
    create_once(path, lambda partial: _write_counts(source, records, num_decoded, workers, on_problem, partial))
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    if was_cached:
        table = _recount_unusable(source, table, num_decoded, workers)
    problems = {}
    if len(places := _unusable_places(table)):
        for place, row in zip(places.tolist(), table.take(pa.array(places)).to_pylist(), strict=True):
            problems[place] = BadSample(row["id"], row["problem"], row["file"])
            on_problem(row["record"], problems[place])
    columns = {name: _integer_column(table[name]) for name in INTEGER_COLUMNS}
    return Counts(**columns, labels=table["label"], groups=table["group"], problems=problems, ids=table["id"])


def counts_file(source: Source, records: np.ndarray, decode: int | None) -> Path:
    """Return the file of the cache for the counts of some records; arguments as in `count`."""
    numbers = hashlib.sha256(records.tobytes()).hexdigest()
    key = json_digest(source.fingerprint, decode, str(SCHEMA), numbers, *map(str, source.parts))
    return source.cache / "counts" / f"{key}.arrow"


def _recount_unusable(source: Source, table: pa.Table, decode: int, workers: int | None) -> pa.Table:
    """Return the table with new rows for the records that could not be used."""
    places = _unusable_places(table)
    if len(places) == 0:
        return table
    records = _integer_column(table["record"])[places]
    num_decoded = int(np.searchsorted(places, decode))
    batches = list(_iter_counted_batches(source, records, 0, num_decoded, workers))
    order = np.arange(len(table))
    order[places] = len(table) + np.arange(len(places))
    return pa.concat_tables([table, pa.Table.from_batches(batches)]).take(pa.array(order))


def _unusable_places(table: pa.Table) -> np.ndarray:
    return np.flatnonzero(_integer_column(table["length"]) == 0)


def _make_batch(rows: list[CountedRow]) -> pa.RecordBatch:
    return pa.record_batch(list(zip(*rows, strict=True)), schema=SCHEMA)


def _integer_column(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of integers as an array; `to_numpy` would import pandas, which takes a second."""
    kind = np.dtype(str(column.type))
    parts = [np.frombuffer(c.buffers()[1], kind, len(c), c.offset * kind.itemsize) for c in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _write_counts(
    source: Source,
    records: np.ndarray,
    decode: int,
    workers: int | None,
    on_problem: Callable[[int, BadSample], object],
    path: Path,
) -> None:
    """Count into a file; complete chunks that a stopped count left there are kept."""
    before: list[pa.RecordBatch] = []
    with suppress(pa.ArrowInvalid, OSError), pa.ipc.open_stream(path.read_bytes()) as reader:
        before += reader  # one by one, so that those before a truncated one are kept
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in before:
            writer.write_batch(batch)
        done = sum(map(len, before))
        for batch in _iter_counted_batches(source, records, done, decode, workers):
            if batch["problem"].null_count < len(batch):
                for row in batch.to_pylist():
                    if row["problem"]:
                        on_problem(row["record"], BadSample(row["id"], row["problem"], row["file"]))
            writer.write_batch(batch)
            sink.flush()


def _collect_seldom(worker: int) -> None:
    """Exempt the parent's objects from garbage collection, which would copy them, and collect the rest rarely.

    A worker makes a million objects a second, hardly any of them in cycles.
    """
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


class TokenCounter:
    """Counts the tokens of samples: by their words, or else by encoding them.

    Of those that are encoded, short conversations without images that equal an earlier one are encoded once.
    """

    def __init__(self, encoder: SampleEncoder):
        self.encoder = encoder
        self._plain = make_plain_counter(encoder)
        self._known: dict[tuple[Turn, ...], TokenCounts] = {}

    def count(self, sample: Sample, sizes: Sequence[MediaSize]) -> TokenCounts:
        """Return the counts of a sample; `sizes` of its images, where the processor needs them.

        Raises:
            BadSample: it cannot be used.
        """
        if self._plain is not None and (counts := self._plain.count(sample, sizes)) is not None:
            return counts
        is_long = sum(len(str(part)) for turn in sample.turns for part in turn.content) > LONGEST_REMEMBERED
        if sample.media or sample.rejected is not None or is_long:
            return self._count(sample, sizes)
        try:
            known = self._known.get(sample.turns)
        except TypeError:  # a user's own reader put something into a turn that has no hash
            return self._count(sample, sizes)
        if known is None:
            known = self._count(sample, sizes)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[sample.turns] = known
        return known

    def _count(self, sample: Sample, sizes: Sequence[MediaSize]) -> TokenCounts:
        encoded = self.encoder.encode(sample, sizes)
        supervised = len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)
        return TokenCounts(len(encoded.input_ids), self.encoder.min_length(encoded), supervised)


class _RecordChunks(Dataset[pa.RecordBatch | Exception]):
    """Chunks of records, counted as they are read; errors are returned, since they cross processes."""

    def __init__(self, source: Source, records: np.ndarray, done: int, decode: int):
        self.source, self.records, self.decode = source, records, decode
        self.starts = range(done, len(records), CHUNK)
        self.counter = TokenCounter(source.encoder)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chunk: int) -> pa.RecordBatch | Exception:
        start = self.starts[chunk]
        numbers = self.records[start : start + CHUNK].tolist()
        try:
            return _make_batch(
                [
                    count_record(self.source, number, decode=place < self.decode, counter=self.counter)
                    for place, number in enumerate(numbers, start)
                ]
            )
        except Exception as error:
            return error


def _iter_counted_batches(
    source: Source, records: np.ndarray, done: int, decode: int, workers: int | None
) -> Iterator[pa.RecordBatch]:
    """Count records from the index `done` on; iterate over chunks of rows, in order."""
    few = len(records) <= FEW
    number = 0 if few else num_cores() if workers is None else workers
    chunks = _RecordChunks(source, records, done, decode)
    loader = DataLoader(chunks, batch_size=None, num_workers=number, worker_init_fn=_collect_seldom)
    title = f"counting {source.name}"
    with show_progress((), title, len(records), initial=done, unit="record", silent=few) as bar:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            bar.update(len(batch))
            yield batch


def count_record(source: Source, number: int, *, decode: bool, counter: TokenCounter) -> CountedRow:
    """Return the row of a record, as in `SCHEMA`; all counts are 0 for a record that cannot be used.

    Of images, headers are read at least; `decode` opens them whole. `counter` is of the source's encoder.
    """
    try:
        sample = source.sample(number)
        check_reply(sample, needed=source.encoder.needs_reply)
        uniform = _count_uniform(sample, source.encoder.processor) if decode else 0
        sizes = [read_image_size(image_ref, sample.id) for image_ref in sample.images if image_ref.frame is None]
        tokens = counter.count(sample, read_media_sizes(sample, source.encoder.processor))
        label_and_group = source.encoder.label_and_group(sample)
    except BadSample as error:
        return number, *[0] * 10, None, None, error.sample_id, error.reason, error.file
    replies = len(sample.replies)
    media = len(sample.media), len(sample.videos), *(sizes[0] if sizes else (0, 0)), uniform
    thinking = int(is_thinking_asked(source.encoder.with_thinking(sample).turns))
    return number, *tokens, replies, *media, thinking, *label_and_group, sample.id, None, None


def _count_uniform(sample: Sample, processor: Processor) -> int:
    """Decode the images and videos of a sample, and return how many images are of one colour throughout.

    Raises:
        BadSample: an image or video does not decode, or an image cannot be converted to RGB.
    """
    opened = open_media(sample)

    def is_uniform_at(index: int) -> bool:
        """Return whether the medium at an index is an image of one colour."""
        medium = opened[index]
        return not isinstance(medium, DecodedVideo) and is_uniform(processor.as_rgb(medium))

    with processor_errors("the processor", sample.id, sample.media, is_uniform_at):
        return sum(map(is_uniform_at, range(len(opened))))
