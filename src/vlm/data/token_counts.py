"""How many tokens each record has: counted once, in parallel, before anything trains, and kept in the cache.

Whatever makes a record unusable is found here too, as far as it can be without decoding every picture.
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
"""The columns of whole numbers, and those of what a prediction head learns, both as they are counted."""
CHUNK = 256
FEW = 4 * CHUNK
"""So many records are counted sooner than processes start."""


@dataclass(frozen=True)
class Counts:
    """What is known of each record that was counted; arrays of one length, read from disk as they are used.

    Attributes:
        record: its number in the source.
        length: its tokens, image tokens counted; 0 for one that cannot be used.
        needed: the fewest tokens that it may be cut to: up to its last image or video, and its first supervised token.
        supervised: its supervised tokens.
        replies: how often it lets the assistant speak.
        images: its pictures and videos; of a video that is shown as frames, each.
        videos: those of them that the model sees as videos.
        width: of its first picture, in pixels; 0 where it has none, or is a video's frame.
        height: as width.
        labels: what a prediction head learns of it, as JSON; null where that is nothing, or not asked for.
        groups: in which group a ranking compares it; null as labels.
        problems: place in these arrays -> why the record cannot be used.
        ids: what the records call themselves.
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
        """What the record at a place calls itself."""
        return self.ids[place].as_py()

    def labels_and_groups_at(self, places: np.ndarray) -> tuple[list[Any], list[str | None]]:
        """Labels and groups of the records at some places; None where one has none."""
        rows = pa.array(places)
        labels = [None if text is None else json.loads(text) for text in self.labels.take(rows).to_pylist()]
        return labels, self.groups.take(rows).to_pylist()


def count(
    source: Source, records: np.ndarray, decode: int | None, workers: int | None,
    on_problem: Callable[[int, BadSample], None] = lambda number, problem: None,
) -> Counts:  # fmt: skip
    """Count records of a source, or find what was counted before.

    Records that could not be used then are looked at again: a picture that was missing may be there now.

    Args:
        source: the source.
        records: the numbers of the records, in order.
        decode: of so many of them, from the first on, the pictures are decoded; None: of all.
        workers: processes that count; None: as many as there are cores.
        on_problem: told of each record that cannot be used, as soon as it is found; where it raises, what was counted
            up to there is kept.
    """
    key = json_digest(source.fingerprint, decode, str(SCHEMA), hashlib.sha256(records.tobytes()).hexdigest())
    path = source.cache / "counts" / f"{key}.arrow"

    known = path.exists()
    whole = len(records) if decode is None else decode
    create_once(path, lambda partial: _write_counts(source, records, whole, workers, on_problem, partial))
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    columns = {name: _integer_column(table.column(name)) for name in INTEGER_COLUMNS}
    texts = {name: table.column(name) for name in LABEL_COLUMNS}
    places = np.flatnonzero(columns["length"] == 0)
    if known:
        rows = _recount_unusable(source, columns, places, int(np.searchsorted(places, whole)), workers)
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
    """Rows of records that could not be used once, counted anew; the columns take on what is different."""
    found = _iter_counted_rows(source, columns["record"][places], 0, decode, workers)
    rows = [dict(zip(SCHEMA.names, row, strict=True)) for chunk in found for row in chunk]
    for place, row in zip(places.tolist(), rows, strict=True):
        for name, column in columns.items():
            column[place] = row[name]
    return rows


def _replace_at(column: pa.ChunkedArray, places: np.ndarray, texts: list[str | None]) -> pa.ChunkedArray:
    """A column with other texts at some places."""
    if not any(text is not None for text in texts):
        return column
    rows = column.to_pylist()
    for place, text in zip(places.tolist(), texts, strict=True):
        rows[place] = text
    return pa.chunked_array([pa.array(rows, column.type)])


def _bad_sample_from_row(row: dict[str, Any]) -> BadSample:
    return BadSample(row["id"], row["problem"], row["file"])


def _integer_column(column: pa.ChunkedArray) -> np.ndarray:
    """A column of whole numbers; `to_numpy` would import pandas, which takes a second and has no part in this."""
    kind = np.dtype(str(column.type))
    parts = [np.frombuffer(one.buffers()[1], kind, len(one), one.offset * kind.itemsize) for one in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, kind)


def _write_counts(
    source: Source, records: np.ndarray, decode: int, workers: int | None,
    on_problem: Callable[[int, BadSample], None], path: Path,
) -> None:  # fmt: skip
    """Count into a file; whole chunks that a stopped count left there are not counted again."""
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
    """The chunks of a file that was not finished, up to where it is torn."""
    batches = []
    if path.exists():
        try:
            with pa.ipc.open_stream(path.read_bytes()) as reader:
                batches += reader  # one by one, so that those before a tear stay
        except (pa.ArrowInvalid, OSError):
            pass
    return batches


class _RecordChunks(Dataset[Any]):
    """Chunks of records, counted when they are asked for; an error comes as a value, since it crosses processes."""

    def __init__(self, source: Source, records: np.ndarray, done: int, decode: int):
        self.source, self.records, self.decode = source, records, decode
        self.starts = range(done, len(records), CHUNK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chunk: int) -> list[tuple[Any, ...]] | Exception:
        start = self.starts[chunk]
        places = range(start, min(start + CHUNK, len(self.records)))
        try:
            return [count_record(self.source, int(self.records[place]), decode=place < self.decode) for place in places]
        except Exception as error:
            return error


def _iter_counted_rows(
    source: Source, records: np.ndarray, done: int, decode: int, workers: int | None
) -> Iterator[list[tuple[Any, ...]]]:
    """Rows of the table of counts, chunk by chunk in order, from a record on."""
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


def count_record(source: Source, number: int, *, decode: bool) -> tuple[Any, ...]:
    """A record's row, as in `SCHEMA`; of one that cannot be used all counts are 0."""
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
    seen = len(sample.media), len(sample.videos), width, height
    return number, len(encoded.input_ids), needed, supervised, replies, *seen, *label_and_group, sample.id, None, None


def check_images(sample: Sample, *, decode: bool) -> tuple[int, int]:
    """Whether a sample's pictures open, as a whole or their headers; width and height of the first, else zeros.

    Raises:
        BadSample: one does not.
    """
    if decode:
        open_media(sample)
    sizes = [read_image_size(image_ref, sample.id) for image_ref in sample.images if image_ref.frame is None]
    return sizes[0] if sizes else (0, 0)
