"""How many tokens each record has: counted once, in parallel, before anything trains, and kept in the cache.

Whatever makes a record unusable is found here too, as far as it can be without decoding every picture.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlm.data.cache import digest_of, made_once
from vlm.data.encode import IGNORED, Encoded, encode
from vlm.data.sample import BadSample
from vlm.data.sources import Source, check_pictures

SCHEMA = pa.schema(
    [
        ("record", pa.int64()), ("length", pa.int32()), ("needed", pa.int32()), ("images", pa.int32()),
        ("id", pa.string()), ("problem", pa.string()), ("file", pa.string()),
    ]
)  # fmt: skip
CHUNK = 256
FEW = 4 * CHUNK
"""So many records are counted sooner than processes start."""


@dataclass(frozen=True)
class Counts:
    """What is known of each record that was counted; arrays of one length, read from disk as they are used.

    Attributes:
        record: its number in the source.
        length: its tokens, image tokens counted; 0 for one that cannot be used.
        needed: the fewest tokens that it may be cut to: up to its last image, and its first supervised token.
        images: its pictures.
        problems: place in these arrays -> why the record cannot be used.
        ids: what the records call themselves.
    """

    record: np.ndarray
    length: np.ndarray
    needed: np.ndarray
    images: np.ndarray
    problems: dict[int, BadSample]
    ids: pa.ChunkedArray

    def id_of(self, place: int) -> str:
        """What the record at a place calls itself."""
        return self.ids[place].as_py()


def count(source: Source, records: np.ndarray, decode: int | None, workers: int | None) -> Counts:
    """Count records of a source, or find what was counted before.

    Args:
        source: the source.
        records: the numbers of the records, in order.
        decode: of so many of them, from the first on, the pictures are decoded; None: of all.
        workers: processes that count; None: as many as there are cores.
    """
    key = digest_of(source.fingerprint, decode, str(SCHEMA), hashlib.sha256(records.tobytes()).hexdigest())
    path = source.cache / "counts" / f"{key}.arrow"

    def make(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for rows in _counted(source, records, len(records) if decode is None else decode, workers):
                writer.write_batch(pa.record_batch(list(zip(*rows, strict=True)), schema=SCHEMA))

    table = pa.ipc.open_file(pa.memory_map(str(made_once(path, make)))).read_all()
    record, length, needed, images = (table.column(name).to_numpy() for name in SCHEMA.names[:4])
    places = np.flatnonzero(length == 0).tolist()
    bad = table.select(["id", "problem", "file"]).take(pa.array(places, pa.int64())).to_pylist()
    problems = {place: BadSample(*row.values()) for place, row in zip(places, bad, strict=True)}
    return Counts(record, length, needed, images, problems, table.column("id"))


class _Chunks(Dataset[Any]):
    """Chunks of records, counted when they are asked for; an error comes as a value, since it crosses processes."""

    def __init__(self, source: Source, records: np.ndarray, decode: int):
        self.source, self.records, self.decode = source, records, decode

    def __len__(self) -> int:
        return -(-len(self.records) // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[Any, ...]] | Exception:
        places = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.records)))
        try:
            return [count_one(self.source, int(self.records[place]), decode=place < self.decode) for place in places]
        except Exception as error:
            return error


def _counted(source: Source, records: np.ndarray, decode: int, workers: int | None) -> Iterator[list[tuple[Any, ...]]]:
    """Rows of the table of counts, chunk by chunk in order."""
    number = 0 if len(records) <= FEW else num_cores() if workers is None else workers
    loader = DataLoader(_Chunks(source, records, decode), batch_size=None, num_workers=number)
    with tqdm(total=len(records), desc=f"counting {source.name}", unit="record", disable=len(records) <= FEW) as bar:
        for rows in loader:
            if isinstance(rows, Exception):
                raise rows
            bar.update(len(rows))
            yield rows


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_one(source: Source, number: int, *, decode: bool) -> tuple[Any, ...]:
    """A record's row: its number, tokens, needed tokens, pictures, and what is wrong with it."""
    try:
        sample = source.sample(number)
        check_pictures(sample, decode=decode)
        encoded = encode(source.encoder.processor, sample)
    except BadSample as error:
        return number, 0, 0, 0, error.sample_id, error.reason, error.file
    needed = needed_tokens(encoded, source.encoder.processor.image_token_id)
    return number, len(encoded.input_ids), needed, len(sample.pictures), sample.id, None, None


def needed_tokens(encoded: Encoded, image_token_id: int) -> int:
    """The fewest tokens that a sample may be cut to: up to its last image token, and its first supervised one."""
    ids, labels = encoded.input_ids, encoded.labels
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    last_image = next((place for place in reversed(range(len(ids))) if ids[place] == image_token_id), -1)
    return max(first, last_image) + 1
