"""Opening files of records: `open_records` for access by index, `stream_records` for access in sequence.

The kind of a file follows from its name; its format says what a record looks like (`records.formats`). JSON and
JSONL are indexed (`index`), CSV and TSV written as tables of texts (`tables`); other tables and data sets are opened by
Hugging Face's `datasets`, tar shards read by `webdataset`.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm.config.model_schema import Options
from vlm.data.records.files import check_is_records
from vlm.data.records.folders import is_empty
from vlm.data.records.index import IndexedRecords, parse_record, read_lines
from vlm.data.records.layout import find_layout
from vlm.data.records.links import check_data_files, check_data_folder
from vlm.data.records.paths import (
    HUB_PATTERN,
    JSON_SUFFIXES,
    TABLE_BUILDERS,
    TEXT_TABLE_SUFFIXES,
    is_address,
    is_tar_path,
    names_records,
    path_problem,
    split_suffix,
)
from vlm.data.records.positions import START, Position, read_shard
from vlm.data.records.rows import read_table_rows
from vlm.data.records.tables import TableRecords, stream_table
from vlm.data.records.tar import expand_shards, make_tar_record, read_tar
from vlm.data.sample import Record

if TYPE_CHECKING:
    import datasets

FOLDER_TABLES = ("metadata.csv", "metadata.jsonl")
"""Tables of a folder of images. The library would choose its images by words in their names, such as `train`."""


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


def open_records(
    path: str, cache: Path, *, split: str = "train", subset: str | None = None, follow_links: bool = False
) -> Records:
    """Open the records of a file, a folder or a data set on the Hub, by its split and subset where it has several.

    The path ends in `.json`, `.jsonl`, `.ndjson`, `.csv` or `.tsv` (all of these also with `.gz`), `.parquet` or
    `.arrow`; is a folder that `datasets` wrote, or one of Parquet files and the like; or `hf://owner/name[@revision]`.

    Raises:
        ValueError: the path is none of these, or does not open.
    """
    if is_tar_path(path):
        raise ValueError(f"{path}: tar shards can only be streamed; set dataset.streaming=true")
    file = Path(path)
    if names_records(path) and file.is_file():
        check_is_records(file)
        suffix, _ = split_suffix(path)
        if suffix in JSON_SUFFIXES:
            return IndexedRecords(file, cache)
        if suffix in TEXT_TABLE_SUFFIXES:
            return TableRecords(file, cache)
    return HubTableRecords(_load_hf_dataset(path, cache, split, subset, streaming=False, follow_links=follow_links))


def stream_records(
    path: str,
    cache: Path,
    *,
    split: str = "train",
    subset: str | None = None,
    shard: int = 0,
    num_shards: int = 1,
    seed: int | None = None,
    allow_pipe: bool = False,
    follow_links: bool = False,
) -> Iterator[object]:
    """Iterate over the records that `stream_with_positions` yields from the start."""
    options: Options = {"split": split, "subset": subset, "shard": shard, "num_shards": num_shards, "seed": seed}
    options |= {"allow_pipe": allow_pipe, "follow_links": follow_links}
    for record, _ in stream_with_positions(path, cache, **options):
        yield record


def stream_with_positions(
    path: str, cache: Path, *, split: str = "train", subset: str | None = None, shard: int = 0, num_shards: int = 1,
    seed: int | None = None, start: Position = START, allow_pipe: bool = False, follow_links: bool = False,
) -> Iterator[tuple[object, Position]]:  # fmt: skip
    """Iterate over the records of a file, a folder or a data set, or over one shard of them, from a position on.

    A record that cannot be read is yielded as a `BadSample` with the reason. The path is as `open_records` takes it, or
    names tar shards: `shards/{000..127}.tar`, a folder of them, addresses of them, or a command `pipe:…` that writes
    one, where `allow_pipe` says that it may run. Links that lead out of a folder are followed where `follow_links` says
    so. Shards of the records consist of whole files where there are enough files, whose order a seed shuffles.

    Yields:
        Each record with the position after it, from which the same shard of the same path and seed can be read on.

    Raises:
        ValueError: the path is none of these, or does not open.
    """
    read: Any
    files, read, parse = [Path(path)], None, lambda record: record
    suffix, is_file = split_suffix(path)[0], names_records(path) and files[0].is_file()
    if is_file:
        check_is_records(files[0])
    if is_tar_path(path):
        files = expand_shards(path, allow_pipe=allow_pipe, follow_links=follow_links)
        read, parse = read_tar, make_tar_record
    elif is_file and suffix in JSON_SUFFIXES and find_layout(files[0]).lines:
        read, parse = read_lines, parse_record
    elif is_file and suffix in JSON_SUFFIXES:
        records = IndexedRecords(files[0], cache)
        read, parse = _read_indices(records), records.__getitem__
    elif is_file and suffix in TEXT_TABLE_SUFFIXES:
        read = partial(_read_text_table, cache)
    else:
        dataset = _load_hf_dataset(path, cache, split, subset, streaming=True, follow_links=follow_links)
        if isinstance(dataset, HubTableRecords):
            read, parse = _read_indices(dataset), dataset.__getitem__
        else:
            files, read = range(dataset.num_shards), partial(_read_table_rows, path, dataset)
    yield from read_shard(files, read, parse, shard=shard, num_shards=num_shards, seed=seed, start=start)


def _read_indices(records: Records) -> Callable[[object, int], Iterator[tuple[int, int]]]:
    """Return a function that iterates over the indices of records, each with the place after it."""
    return lambda file, start: ((index, index + 1) for index in range(start, len(records)))


def _read_text_table(cache: Path, file: Path, start: int) -> Iterator[tuple[Record, int]]:
    """Iterate over the rows of a CSV or TSV file; those before are parsed, since only that tells where rows end."""
    return zip(islice(stream_table(file, cache), start, None), count(start + 1), strict=False)


def _read_table_rows(path: str, dataset: Any, file: int, start: int) -> Iterator[tuple[Record, int]]:
    """Iterate as `read_table_rows`; raise ValueError if a file is damaged, which is found on the way."""
    import pyarrow as pa

    try:
        yield from read_table_rows(dataset, file, start)
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:  # of the disk or the network
            raise
        raise ValueError(f"{path}: file {file}, counted from 0, is damaged: {error}") from error


def _load_hf_dataset(
    path: str, cache: Path, split: str, subset: str | None, *, streaming: bool, follow_links: bool
) -> Any:
    """Load a Hugging Face data set: a `Dataset`; streamed an `IterableDataset`, or records that are on the disk."""
    import datasets
    from datasets.exceptions import DatasetsError

    hub = HUB_PATTERN.fullmatch(path)
    if hub is None and is_address(path):  # of which the library would open many kinds, one in another
        raise ValueError(f"{path}: {path_problem(path)}")
    if table := next((table for name in FOLDER_TABLES if (table := Path(path, name)).is_file()), None):
        raise ValueError(
            f"{path}: a folder of images with a table; give the table: dataset.path={table} "
            f"dataset.image_folder={path}. vlm data show then names the format and the columns"
        )
    options: Options = {"split": split, "streaming": streaming}
    if not streaming:
        options["cache_dir"] = str(cache / "datasets")
    try:
        if hub is not None:
            cells = _text_cells(hub[1], subset, split, revision=hub[2])
            return datasets.load_dataset(hub[1], subset, revision=hub[2], **cells, **options)
        kind = TABLE_BUILDERS.get(split_suffix(path)[0])
        if kind is not None and not Path(path).is_dir():  # Spark writes folders with such names
            return datasets.load_dataset(kind, data_files={split: path}, **options)
        if Path(path).is_dir():
            if is_empty(Path(path)):
                raise ValueError("the folder is empty")
            check_data_folder(Path(path), follow_links=follow_links)
        if Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"it has the splits {', '.join(map(str, dataset))}")
                dataset = dataset[split]
            return HubTableRecords(dataset) if streaming else dataset
        if Path(path).is_dir():
            folder = str(Path(path).resolve())  # the library names a data set after its folder, which . has no name for
            return datasets.load_dataset(folder, subset, **_text_cells(folder, subset, split), **options)
    except (DatasetsError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path}: does not open (split {split}, subset {subset}): {error}") from error
    raise ValueError(f"{path}: {path_problem(path) or 'there is no such file'}")


def _text_cells(name: str, subset: str | None, split: str, *, revision: str | None = None) -> dict[str, object]:
    """Return the options with which `datasets` reads the CSV files of a data set as texts; none for other files."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    config = datasets.load_dataset_builder(name, subset, revision=revision).config
    if isinstance(config.data_files, dict):
        check_data_files(chain(*config.data_files.values()), name)
    split = re.split(r"[\[+]", split)[0]  # of `train[:100]` and `train+test`
    if not isinstance(config, CsvConfig) or not isinstance(config.data_files, dict) or split not in config.data_files:
        return {}
    import pandas as pd

    header: Options = {"header": config.header, "names": config.names, "skiprows": config.skiprows}
    file = config.data_files[split][0]
    columns = pd.read_csv(file, sep=config.sep, nrows=0, encoding=config.encoding, **header).columns
    texts = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"features": config.features or texts, "keep_default_na": False, "na_values": [""]}
