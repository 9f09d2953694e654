"""Opening files of records: `open_records` for access by index, `stream_records` for access in sequence.

The kind of a file follows from its name; its format says what a record looks like (`records.formats`). JSON and
JSONL are indexed (`index`), CSV and TSV written as tables of texts (`tables`); other tables and data sets are opened by
Hugging Face's `datasets`, tar shards read by `webdataset`.
"""

import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vlm.data.records.files import check_is_records, open_bytes
from vlm.data.records.index import IndexedRecords, iter_lines, parse_record
from vlm.data.records.layout import find_layout
from vlm.data.records.paths import (
    HUB_PATTERN,
    JSON_SUFFIXES,
    PIPE_PREFIX,
    TABLE_BUILDERS,
    TEXT_TABLE_SUFFIXES,
    is_tar_path,
    names_records,
    path_problem,
    split_suffix,
)
from vlm.data.records.tables import TableRecords, stream_table
from vlm.data.sample import BadSample, Record

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")
Item = TypeVar("Item")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of image files in a tar shard."""
STREAM_BATCH_ROWS = 16
"""Rows of a table that a stream reads at a time."""


class Records(Protocol):
    """Records by index; none is in memory before it is read."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object: ...


class HubTableRecords:
    """Rows of a Hugging Face data set; images stay bytes or paths and are not decoded."""

    def __init__(self, dataset: "datasets.Dataset"):
        self.fingerprint: str = dataset._fingerprint
        self._rows: Any = dataset.with_format("arrow")  # its rows are tables then

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        """Return a record."""
        return self._rows[index].to_pylist()[0]


def open_records(path: str, cache: Path, *, split: str = "train", subset: str | None = None) -> Records:
    """Open the records of a file, a folder or a data set on the Hub, by its split and subset where it has several.

    The path ends in `.json`, `.jsonl`, `.ndjson`, `.csv` or `.tsv` (all of these also with `.gz`), `.parquet` or
    `.arrow`; is a folder that `datasets` wrote, or one of Parquet files and the like; or `hf://owner/name[@revision]`.

    Raises:
        ValueError: the path is none of these, or does not open.
    """
    if is_tar_path(path):
        raise ValueError(f"{path}: tar shards are read one after the other; that needs dataset.streaming=true")
    file = Path(path)
    if names_records(path) and file.is_file():
        check_is_records(file)
        suffix, _ = split_suffix(path)
        if suffix in JSON_SUFFIXES:
            return IndexedRecords(file, cache)
        if suffix in TEXT_TABLE_SUFFIXES:
            return TableRecords(file, cache)
    return HubTableRecords(_load_hf_dataset(path, cache, split, subset, streaming=False))


def stream_records(
    path: str, cache: Path, *, split: str = "train", subset: str | None = None, shard: int = 0, num_shards: int = 1,
    seed: int | None = None,
) -> Iterator[object]:  # fmt: skip
    """Iterate over the records of a file, a folder or a data set, or over one shard of them.

    A record that cannot be read is yielded as a `BadSample` with the reason. The path is as `open_records` takes it, or
    names tar shards: `shards/{000..127}.tar`, a folder of them, or a command `pipe:…` that writes one. Shards of the
    records consist of whole files where there are enough files, whose order a seed shuffles.

    Raises:
        ValueError: the path is none of these, or does not open.
    """
    file, suffix = Path(path), split_suffix(path)[0]
    is_file = names_records(path) and file.is_file()
    if is_file:
        check_is_records(file)
    if is_tar_path(path):
        yield from _read_shard(expand_shard_urls(path), read_tar_records, shard, num_shards, seed)
    elif is_file and suffix in JSON_SUFFIXES and find_layout(file).lines:
        with open_bytes(file) as opened:
            lines = islice(iter_lines(opened), shard, None, num_shards)
            yield from (value_or_bad_sample(parse_record, line) for line in lines)
    elif is_file and suffix in JSON_SUFFIXES:
        records = IndexedRecords(file, cache)
        yield from (value_or_bad_sample(records.__getitem__, index) for index in range(shard, len(records), num_shards))
    elif is_file and suffix in TEXT_TABLE_SUFFIXES:
        yield from islice(stream_table(file, cache), shard, None, num_shards)
    else:
        dataset = _load_hf_dataset(path, cache, split, subset, streaming=True)
        files = range(dataset.num_shards)
        yield from _read_shard(files, partial(stream_table_rows, dataset), shard, num_shards, seed)


def _read_shard(
    files: Sequence[T], read: Callable[[Sequence[T]], Iterator[object]], shard: int, num_shards: int, seed: int | None
) -> Iterator[object]:
    """Read the records of a shard: of some of the files where there are enough of them, else some records of all."""
    if seed is not None:
        files = random.Random(seed).sample(files, len(files))
    if len(files) >= num_shards:
        return read(files[shard::num_shards])
    return islice(read(files), shard, None, num_shards)


def stream_table_rows(dataset: "datasets.IterableDataset", files: Sequence[int]) -> Iterator[Record]:
    """Iterate over the rows of some files of a streamed Hugging Face data set, with images as they are stored.

    Rows are read in batches, since the plain iterator of a data set shards its rows once more in a worker of a
    `DataLoader`; and file by file, since its `shuffle` waits for five seconds at the end.
    """
    for file in files:
        tables: Any = dataset.with_format("arrow").shard(dataset.num_shards, file).iter(STREAM_BATCH_ROWS)
        for table in tables:
            yield from table.to_pylist()


def expand_shard_urls(path: str) -> list[str]:
    """Return the shards that a path with braces, a folder or a command stands for.

    Raises:
        ValueError: a shard does not exist.
    """
    from webdataset.shardlists import expand_urls

    if path.startswith(PIPE_PREFIX):
        return expand_urls(path)
    urls = sorted(map(str, Path(path).glob("*.tar"))) if Path(path).is_dir() else expand_urls(path)
    if missing := [url for url in urls if not os.path.isfile(url)]:
        raise ValueError(f"{path}: there is no file {missing[0]}")
    return urls


def read_tar_records(urls: Sequence[str]) -> Iterator[object]:
    """Iterate over the samples of tar shards as records: files of one name are one sample.

    The `.json` is the record, the `.txt` its `caption`; images are bytes under `image` (several under `images`). The
    name is the `id` of a record without one.
    """
    from webdataset.tariterators import tarfile_samples

    for url in urls:
        try:
            yield from (value_or_bad_sample(_tar_record, sample) for sample in tarfile_samples([{"url": url}]))
        except (tarfile.TarError, OSError, ValueError) as error:  # a torn shard, a command that fails
            yield BadSample("?", f"{url} does not read on: {error.args[0] if error.args else error}", url)


def _tar_record(sample: Record) -> Record:
    name = sample["__key__"]
    record = parse_record(sample["json"], name) if "json" in sample else {}
    if not isinstance(record, dict):
        raise BadSample(name, f"its .json must hold a mapping, got {type(record).__name__}")
    if "txt" in sample:
        record["caption"] = sample["txt"].decode(errors="replace")
    files = {key: value for key, value in sample.items() if key.rpartition(".")[2].lower() in IMAGE_EXTENSIONS}
    images = [{"bytes": files[key], "path": f"{name}.{key}"} for key in sorted(files, key=_natural_sort_key)]
    if images:
        record = {key: value for key, value in record.items() if key not in ("image", "images")}
        if len(images) > 1:
            record["images"] = images
        else:
            record["image"] = images[0]
    return {"id": name, **record}


def _natural_sort_key(key: str) -> list[tuple[int, str]]:
    """Return a key that sorts `10.png` after `9.png`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)]


def value_or_bad_sample(read: Callable[[Item], T], item: Item) -> T | BadSample:
    """Return the result of a function for an item, or the `BadSample` that it raises."""
    try:
        return read(item)
    except BadSample as error:
        return error


def _load_hf_dataset(path: str, cache: Path, split: str, subset: str | None, *, streaming: bool) -> Any:
    """Load a Hugging Face data set: a `Dataset`, or an `IterableDataset` where it is streamed."""
    import datasets
    from datasets.exceptions import DatasetsError

    options: dict[str, Any] = {"split": split, "streaming": streaming}
    if not streaming:
        options["cache_dir"] = str(cache / "datasets")
    try:
        if hub := HUB_PATTERN.fullmatch(path):
            cells = _text_cells(hub[1], subset, split, revision=hub[2])
            return datasets.load_dataset(hub[1], subset, revision=hub[2], **cells, **options)
        if (kind := TABLE_BUILDERS.get(split_suffix(path)[0])) is not None:
            return datasets.load_dataset(kind, data_files={split: path}, **options)
        if Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"it has the splits {', '.join(map(str, dataset))}")
                dataset = dataset[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        if Path(path).is_dir():
            return datasets.load_dataset(path, subset, **_text_cells(path, subset, split), **options)
    except (DatasetsError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path}: does not open (split {split}, subset {subset}): {error}") from error
    raise ValueError(f"{path}: {path_problem(path) or 'there is no such file'}")


def _text_cells(name: str, subset: str | None, split: str, *, revision: str | None = None) -> dict[str, Any]:
    """Return the options with which `datasets` reads the CSV files of a data set as texts; none for other files."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    config = datasets.load_dataset_builder(name, subset, revision=revision).config
    split = re.split(r"[\[+]", split)[0]  # of `train[:100]` and `train+test`
    if not isinstance(config, CsvConfig) or not isinstance(config.data_files, dict) or split not in config.data_files:
        return {}
    import pandas as pd

    header: dict[str, Any] = {"header": config.header, "names": config.names, "skiprows": config.skiprows}
    file = config.data_files[split][0]
    columns = pd.read_csv(file, sep=config.sep, nrows=0, encoding=config.encoding, **header).columns
    texts = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"features": config.features or texts, "keep_default_na": False, "na_values": [""]}
