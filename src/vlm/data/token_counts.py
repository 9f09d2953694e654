"""Counts of each record's tokens: made once, in parallel, before anything trains, and kept in the cache.

Records that cannot be used are found here too, as far as possible without decoding every image.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.data.cache import create_once, json_digest
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processes import num_cores
from vlm.data.sample import BadSample, Sample
from vlm.data.sources import Source
from vlm.data.vision.images import open_media, read_image_size, read_media_sizes

SCHEMA = pa.schema(
    [
        ("record", pa.int64()), ("length", pa.int32()), ("needed", pa.int32()), ("supervised", pa.int32()),
        ("replies", pa.int32()), ("images", pa.int32()), ("videos", pa.int32()), ("width", pa.int32()),
        ("height", pa.int32()), ("label", pa.string()), ("group", pa.string()), ("id", pa.string()),
        ("problem", pa.string()), ("file", pa.string()),
    ]
)  # fmt: skip
INTEGER_COLUMNS, LABEL_COLUMNS = SCHEMA.names[:9], ("label", "group")
"""The columns of integers, and those of labels and groups for prediction heads."""
CHUNK = 256
FEW = 4 * CHUNK
"""Up to this many records are counted faster in this process than in workers that have to start."""

CountedRow = tuple[Any, ...]
"""A row of `SCHEMA`."""


@dataclass(frozen=True)
class Counts:
    """Counts of records: arrays with an entry for each record, read from disk as they are used.

    Attributes:
        record: its index in the source.
        length: number of tokens, image tokens included; 0 for a record that cannot be used.
        needed: the fewest tokens that it may be cut to: up to its last image or video, and its first supervised token.
        supervised: number of supervised tokens.
        replies: number of assistant turns.
        images: number of images and videos; every frame of a video that is read as images.
        videos: number of those that the model reads as videos.
        width: width of the first image in pixels; 0 where it has none, or a frame of a video.
        height: height, as width.
        labels: its label for prediction heads as JSON; null without one, or where labels are not read.
        groups: the group within which a ranking compares it; null as labels.
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
    labels: pa.ChunkedArray
    groups: pa.ChunkedArray
    problems: dict[int, BadSample]
    ids: pa.ChunkedArray

    def record_id(self, place: int) -> str:
        """Return the name of the record at a place."""
        return self.ids[place].as_py()

    def labels_and_groups_at(self, places: np.ndarray) -> tuple[list[object], list[str | None]]:
        """Return the labels and groups of the records at some places; None for a record without one."""
        rows = pa.array(places)
        labels: list[object] = [
            None if text is None else json.loads(text) for text in self.labels.take(rows).to_pylist()
        ]
        return labels, self.groups.take(rows).to_pylist()


def count(
    source: Source, records: np.ndarray, decode: int | None, workers: int | None,
    on_problem: Callable[[int, BadSample], None] = lambda number, problem: None,
) -> Counts:  # fmt: skip
    """Count the records of a source, or read the counts from the cache.

    Records that could not be used before are counted again: a missing image may be there now.

    Args:
        source: the source.
        records: the indices of the records, in order.
        decode: the number of records, from the first on, whose images are decoded; None for all.
        workers: number of processes; defaults to the number of cores.
        on_problem: called for each record that cannot be used, as soon as it is found; where it raises, the counts up
            to there are kept.
    """
    key = json_digest(source.fingerprint, decode, str(SCHEMA), hashlib.sha256(records.tobytes()).hexdigest())
    path = source.cache / "counts" / f"{key}.arrow"

    was_cached = path.exists()
    num_decoded = len(records) if decode is None else decode
    create_once(path, lambda partial: _write_counts(source, records, num_decoded, workers, on_problem, partial))
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    columns = {name: _integer_column(table.column(name)) for name in INTEGER_COLUMNS}
    texts = {name: table.column(name) for name in LABEL_COLUMNS}
    places = np.flatnonzero(columns["length"] == 0)
    if was_cached:
        rows = _recount_unusable(source, columns, places, int(np.searchsorted(places, num_decoded)), workers)
        texts = {name: _replace_at(column, places, [row[name] for row in rows]) for name, column in texts.items()}
    else:
        rows = table.take(pa.array(places)).to_pylist() if len(places) else []
    bad = {place: _bad_sample_from_row(row) for place, row in zip(places.tolist(), rows, strict=True) if row["problem"]}
    for place, problem in bad.items():
        on_problem(int(columns["record"][place]), problem)
    return Counts(**columns, labels=texts["label"], groups=texts["group"], problems=bad, ids=table.column("id"))


def _recount_unusable(
    source: Source, columns: dict[str, np.ndarray], places: np.ndarray, decode: int, workers: int | None
) -> list[dict[str, Any]]:
    """Count the records at some places anew, update the columns there, and return their rows."""
    chunks = _iter_counted_rows(source, columns["record"][places], 0, decode, workers)
    rows = [dict(zip(SCHEMA.names, row, strict=True)) for chunk in chunks for row in chunk]
    for place, row in zip(places.tolist(), rows, strict=True):
        for name, column in columns.items():
            column[place] = row[name]
    return rows


def _replace_at(column: pa.ChunkedArray, places: np.ndarray, texts: list[str | None]) -> pa.ChunkedArray:
    """Return a column with other texts at some places."""
    if not any(text is not None for text in texts):
        return column
    rows = column.to_pylist()
    for place, text in zip(places.tolist(), texts, strict=True):
        rows[place] = text
    return pa.chunked_array([pa.array(rows, column.type)])


def _bad_sample_from_row(row: dict[str, Any]) -> BadSample:
    return BadSample(row["id"], row["problem"], row["file"])


def _integer_column(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of integers as an array; `to_numpy` would import pandas, which takes a second."""
    kind = np.dtype(str(column.type))
    parts = [np.frombuffer(c.buffers()[1], kind, len(c), c.offset * kind.itemsize) for c in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _write_counts(
    source: Source, records: np.ndarray, decode: int, workers: int | None,
    on_problem: Callable[[int, BadSample], None], path: Path,
) -> None:  # fmt: skip
    """Count into a file; complete chunks that a stopped count left there are kept."""
    before = _read_complete_batches(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in before:
            writer.write_batch(batch)
        done = sum(map(len, before))
        for rows in _iter_counted_rows(source, records, done, decode, workers):
            for row in rows:
                if row[-2]:
                    on_problem(row[0], BadSample(*row[-3:]))
            writer.write_batch(pa.record_batch(list(zip(*rows, strict=True)), schema=SCHEMA))
            sink.flush()


def _read_complete_batches(path: Path) -> list[pa.RecordBatch]:
    """Read the complete chunks of a file that was not finished."""
    batches = []
    if path.exists():
        try:
            with pa.ipc.open_stream(path.read_bytes()) as reader:
                batches += reader  # one by one, so that those before a truncated one are kept
        except (pa.ArrowInvalid, OSError):
            pass
    return batches


class _RecordChunks(Dataset[list[CountedRow] | Exception]):
    """Chunks of records, counted as they are read; errors are returned, since they cross processes."""

    def __init__(self, source: Source, records: np.ndarray, done: int, decode: int):
        self.source, self.records, self.decode = source, records, decode
        self.starts = range(done, len(records), CHUNK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chunk: int) -> list[CountedRow] | Exception:
        start = self.starts[chunk]
        places = range(start, min(start + CHUNK, len(self.records)))
        try:
            return [count_record(self.source, int(self.records[place]), decode=place < self.decode) for place in places]
        except Exception as error:
            return error


def _iter_counted_rows(
    source: Source, records: np.ndarray, done: int, decode: int, workers: int | None
) -> Iterator[list[CountedRow]]:
    """Count records from the index `done` on; iterate over chunks of rows, in order."""
    few = len(records) <= FEW
    number = 0 if few else num_cores() if workers is None else workers
    loader = DataLoader(_RecordChunks(source, records, done, decode), batch_size=None, num_workers=number)
    title = f"counting {source.name}"
    with tqdm(total=len(records), initial=done, desc=title, unit="record", disable=few) as bar:
        for rows in loader:
            if isinstance(rows, Exception):
                raise rows
            bar.update(len(rows))
            yield rows


def count_record(source: Source, number: int, *, decode: bool) -> CountedRow:
    """Return the row of a record, as in `SCHEMA`; all counts are 0 for a record that cannot be used."""
    try:
        sample = source.sample(number)
        width, height = check_images(sample, decode=decode)
        encoded = source.encoder.encode(sample, read_media_sizes(sample, source.encoder.processor))
        label_and_group = source.encoder.label_and_group(sample)
    except BadSample as error:
        return number, *[0] * 8, None, None, error.sample_id, error.reason, error.file
    needed = source.encoder.min_length(encoded)
    supervised = len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)
    replies = sum(turn.role == "assistant" for turn in sample.turns)
    media = len(sample.media), len(sample.videos), width, height
    return number, len(encoded.input_ids), needed, supervised, replies, *media, *label_and_group, sample.id, None, None


def check_images(sample: Sample, *, decode: bool) -> tuple[int, int]:
    """Check that a sample's images open, all of them or their headers; return width and height of the first, or zeros.

    Raises:
        BadSample: an image does not open.
    """
    if decode:
        open_media(sample)
    sizes = [read_image_size(image_ref, sample.id) for image_ref in sample.images if image_ref.frame is None]
    return sizes[0] if sizes else (0, 0)
