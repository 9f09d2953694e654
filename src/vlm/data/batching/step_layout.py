"""The samples of one optimiser step, laid out in packed rows: `trainer.packing_strategy=step`.

Which samples a step has, and which of them form a micro-batch, is decided as without packing. Here they are put into
rows that cost about the same, equally many on every rank, so that ranks do not wait for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import ceil
from typing import Final, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.batching.stats import num_images
from vlm.data.dataset import SampleDataset
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped

MICRO_BATCH: Final = "micro_batch"
"""The key of packed batches that says, for each token, which micro-batch of the step its sample belongs to."""

MORE_ROWS: Final = "more_rows"
"""The key of further rows of the same accumulation step, each a batch; the training loop takes them out."""

Row = list[tuple[int, int]]
"""The samples of a row: for each its index in the data set, and the number of its micro-batch in the step."""

Samples = Sequence[SampleInputs | Skipped]


@dataclass(frozen=True)
class SampleCosts:
    """The operations of training on a sample, in any unit; only ratios matter.

    Attributes:
        token: of each token, attention aside.
        pair: of each token and one that it attends to: itself or one before it.
        image: of each image.
    """

    token: float
    pair: float
    image: float = 0.0

    def of(self, lengths: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the cost of samples `(samples,)` with these numbers of tokens and images."""
        lengths = lengths.astype(np.float64)
        return self.token * lengths + self.pair * lengths * (lengths + 1) / 2 + self.image * images


def fill_rows(
    lengths: Sequence[int], costs: Sequence[float], *, fewest: int, multiple: int = 1, max_tokens: int | None = None
) -> list[list[int]]:
    """Put samples into rows that cost about the same: the places of each row's samples, in order.

    From the costliest on, each sample goes into the cheapest row that has room (Graham 1969, longest processing time
    first: the costliest row costs at most 4/3 of the least possible where there is room everywhere).

    Args:
        lengths: number of tokens of each sample, none above `max_tokens`.
        costs: cost of each sample.
        fewest: the least number of rows.
        multiple: the number of rows is a multiple of it; `fewest` has to be one.
        max_tokens: the most tokens of a row; None: any number.
    """
    number = fewest
    if max_tokens is not None:
        number = max(fewest, ceil(sum(lengths) / max_tokens / multiple) * multiple)
    while (rows := _try_to_fill(lengths, costs, number, max_tokens)) is None:
        number += multiple
    return rows


def _try_to_fill(
    lengths: Sequence[int], costs: Sequence[float], number: int, max_tokens: int | None
) -> list[list[int]] | None:
    """Fill so many rows; return None if a sample does not fit into any of them."""
    rows: list[list[int]] = [[] for _ in range(number)]
    room = [float("inf") if max_tokens is None else max_tokens] * number
    cheapest = [(0.0, row) for row in range(number)]  # a heap
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        full = []
        while cheapest and room[cheapest[0][1]] < lengths[place]:
            full.append(heappop(cheapest))
        if not cheapest:
            return None
        cost, row = heappop(cheapest)
        rows[row].append(place)
        room[row] -= lengths[place]
        for entry in (*full, (cost + costs[place], row)):
            heappush(cheapest, entry)
    return [sorted(row) for row in rows]


def lay_out_step(
    micro_batches: Sequence[Sequence[int]],
    lengths: np.ndarray,
    costs: np.ndarray,
    *,
    num_ranks: int = 1,
    max_tokens: int | None = None,
) -> list[list[list[Row]]]:
    """Lay out the samples of a step: for each rank and each of its accumulation steps, one or more rows.

    Every rank has the same number of rows in each accumulation step; a row may be empty if samples are few.

    Args:
        micro_batches: the indices of the samples of each micro-batch: those of all ranks for the first accumulation
            step, then those for the second, and so on.
        lengths: `(all samples,)`, numbers of tokens.
        costs: `(all samples,)`.
        num_ranks: number of ranks.
        max_tokens: the most tokens of a row; None: rows are as many as micro-batches.
    """
    samples = [(index, number) for number, batch in enumerate(micro_batches) for index in batch]
    indices = [index for index, _ in samples]
    sample_costs = costs[indices].tolist()
    rows = fill_rows(
        lengths[indices].tolist(), sample_costs, fewest=len(micro_batches), multiple=num_ranks, max_tokens=max_tokens
    )
    row_costs = [sum(sample_costs[place] for place in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: -row_costs[row])
    accumulation, rows_per_rank = len(micro_batches) // num_ranks, len(rows) // num_ranks
    steps: list[list[list[Row]]] = [[[] for _ in range(accumulation)] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for turn in range(rows_per_rank):  # rows of like cost run at the same time; the costliest goes where least is done
        dealt = order[turn * num_ranks : (turn + 1) * num_ranks]
        ranks = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, row in zip(ranks, dealt, strict=True):
            totals[rank] += row_costs[row]
            steps[rank][turn * accumulation // rows_per_rank].append([samples[place] for place in rows[row]])
    return steps


class RowDataset(Dataset[Samples]):
    """The samples of a row, by the row; each says which micro-batch it belongs to."""

    def __init__(self, dataset: SampleDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, row: Row) -> Samples:
        """Return the samples of a row, each with the number of its micro-batch."""
        return [self._read(index, micro_batch) for index, micro_batch in row]

    def _read(self, index: int, micro_batch: int) -> SampleInputs | Skipped:
        sample = self.dataset[index]
        if isinstance(sample, Skipped):
            return sample
        return {**sample, MICRO_BATCH: torch.full((len(sample["input_ids"]),), micro_batch)}


class RowCollator:
    """Makes a batch of the rows of an accumulation step: the first one, with the others under `MORE_ROWS`.

    Args:
        collate: makes padded batches.
    """

    def __init__(self, collate: Collator):
        self.collate_row = PackingCollator(replace(collate, tokens=(*collate.tokens, MICRO_BATCH)))

    def __call__(self, rows: Sequence[Samples]) -> Batch:
        """Collate one or more rows; a row without samples has a token or an image that nothing is trained on from."""
        first, *more = map(self.collate_row, rows)
        return cast(Batch, {**first, MORE_ROWS: more}) if more else first


@dataclass(eq=False)
class MicroBatchCollator:
    """Makes a batch of the samples of one micro-batch, in as few rows as `max_tokens` allows.

    Attributes:
        collate: makes a batch of the rows.
        costs: balances the rows.
        max_tokens: the most tokens of a row, which no sample has more of; None: a single row.
    """

    collate: RowCollator
    costs: SampleCosts
    max_tokens: int | None

    def __call__(self, samples: Samples) -> Batch:
        """Collate samples; records that were left out go with the first row."""
        items = [sample for sample in samples if not isinstance(sample, Skipped)]
        lengths = [len(item["input_ids"]) for item in items]
        costs = self.costs.of(np.array(lengths), np.array([num_images(item) for item in items]))
        laid_out = fill_rows(lengths, costs.tolist(), fewest=1, max_tokens=self.max_tokens)
        rows: list[list[SampleInputs | Skipped]] = [[items[place] for place in row] for row in laid_out]
        rows[0] += [sample for sample in samples if isinstance(sample, Skipped)]
        return self.collate(rows)


def get_rows(batch: SampleInputs) -> list[SampleInputs]:
    """Return the rows of an accumulation step, each a batch; a batch that is not packed is its only one."""
    return [batch, *batch.get(MORE_ROWS, ())]
