"""Reads the rows of a streamed Hugging Face data set in sequence, starting at any row of a file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlm.data.sample import Record

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 16
"""Rows of a table that a stream reads at a time."""


def read_table_rows(dataset: "datasets.IterableDataset", file: int, start: int = 0) -> Iterator[tuple[Record, int]]:
    """Iterate over the rows of one of a data set's files, each with the number of rows up to it; images as stored.

    Rows are read in batches, since the plain iterator of a data set shards its rows once more in a worker of a
    `DataLoader`; and file by file, since its `shuffle` waits for five seconds at the end. Row groups of Parquet before
    `start` are not read; files of other kinds are read from their beginning, and rows before `start` not converted.
    """
    data: Any = dataset.with_format("arrow").shard(dataset.num_shards, file)
    parts, row = [data], 0
    if start and "row_groups_list" in data._ex_iterable.kwargs:
        parts, row = _row_groups_from(data, start)
    for part in parts:
        for table in part.iter(BATCH_ROWS):
            if row + len(table) > start:
                passed = max(start - row, 0)
                for number, record in enumerate(table.slice(passed).to_pylist(), start=row + passed + 1):
                    yield record, number
            row += len(table)


def _row_groups_from(data: Any, start: int) -> tuple[list[Any], int]:
    """Return the row groups of a Parquet file from that on which has a row, and the number of rows before them."""
    import pyarrow.parquet as pq
    from datasets.utils.file_utils import xopen

    groups = data.reshard()
    with xopen(data._ex_iterable.kwargs["files"][0], "rb") as file:
        metadata = pq.ParquetFile(file).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    first, row = 0, 0
    while first < len(sizes) and row + sizes[first] <= start:
        row += sizes[first]
        first += 1
    return [groups.shard(groups.num_shards, group) for group in range(first, len(sizes))], row
