"""Batches of preferences in packed rows: the replies of a record follow its prompt, which is there only once.

A micro-batch makes one row, or as many as `max_tokens` needs. All replies of a record are in one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY, Collator
from vlm.data.batching.packing import BRANCHES, PackingCollator, check_row_capacity
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.batching.stats import BATCH_STATS, num_images
from vlm.data.batching.step_layout import MORE_ROWS, SampleCosts, fill_rows
from vlm.data.preference.collator import RECORD_INDEX, RECORDS, ROLES, SEQUENCES
from vlm.data.preference.dataset import PreferenceDataset, PreferenceItem
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped


def check_records_fit(dataset: PreferenceDataset, max_tokens: int) -> None:
    """Check that every record fits into a row, whatever its sides share.

    Raises:
        ValueError: a record may be longer than `max_tokens`.
    """
    most = 2 * int(dataset.lengths.max())
    if most > max_tokens:
        raise ValueError(
            f"trainer.max_tokens_per_batch={max_tokens}: both replies of a record are in one row, and with a prompt "
            f"each they may have {most:,} tokens; raise it, or lower dataset.max_length"
        )


@dataclass(frozen=True, eq=False)
class PackedPreferenceCollator:
    """Makes packed rows of `PreferenceDataset` items.

    Attributes:
        collate: makes padded rows of conversations.
        merger: puts the replies of a record after one prompt; where they share none, they are samples of their own.
        costs: balances the rows.
        max_tokens: the most tokens of a row; None: any number.
    """

    collate: Collator
    merger: BranchMerger
    costs: SampleCosts
    max_tokens: int | None = None

    def __call__(self, items: Sequence[PreferenceItem | Skipped]) -> Batch:
        """Return the first row, with the others under `MORE_ROWS`; of `records` without any, a row of none.

        Rows have `roles` and `records` of each of their sequences, and `sequences`, `(1, tokens)`: which one each token
        belongs to, 0 at dummies.

        Raises:
            ValueError: a record is longer than a row.
        """
        records = [item for item in items if not isinstance(item, Skipped)]
        samples = [self._merge(record) for record in records]
        lengths = [sum(len(sample["input_ids"]) for sample in own) for own in samples]
        if self.max_tokens is not None:
            check_row_capacity(np.array(lengths), self.max_tokens)
        images = np.array([sum(map(num_images, own)) for own in samples])
        costs = self.costs.of(np.array(lengths), images).tolist()
        layout = fill_rows(lengths, costs, fewest=1, max_tokens=self.max_tokens)
        rows = [self._make_row([records[place] for place in row], [samples[place] for place in row]) for row in layout]
        first, *more = rows
        if skipped := [item for item in items if isinstance(item, Skipped)]:
            first[SKIPPED_KEY] = skipped
        return cast(Batch, first | {MORE_ROWS: more} if more else first)

    def _merge(self, record: PreferenceItem) -> list[SampleInputs]:
        """Return the samples of a record: one where its sides share a prompt."""
        merged = self.merger.merge(record["sides"])
        return record["sides"] if merged is None else [merged]

    def _make_row(self, records: Sequence[PreferenceItem], samples: Sequence[Sequence[SampleInputs]]) -> SampleInputs:
        """Return a row of records, each with its samples."""
        number, row = 0, []
        for sample in (sample for own in samples for sample in own):
            lengths = torch.tensor(_sequence_lengths(sample))
            row.append(sample | {SEQUENCES: torch.arange(number, number + len(lengths)).repeat_interleave(lengths)})
            number += len(lengths)
        collate = PackingCollator(replace(self.collate, tokens=(*self.collate.tokens, SEQUENCES)))
        batch: SampleInputs = {**collate(row)}
        batch.setdefault(SEQUENCES, torch.zeros_like(batch["input_ids"]))
        places = [place for place, record in enumerate(records) for _ in record["sides"]]
        batch[ROLES] = torch.tensor([role for record in records for role in record["roles"]], dtype=torch.int64)
        batch[RECORDS] = torch.tensor(places, dtype=torch.int64)
        batch[RECORD_INDEX] = torch.tensor([record["index"] for record in records], dtype=torch.int64)
        batch[SAMPLE_REFS] = [record["ref"] for record in records]
        if BATCH_STATS in batch:
            batch[BATCH_STATS] = replace(batch[BATCH_STATS], samples=len(records))
        return batch


def _sequence_lengths(sample: SampleInputs) -> list[int]:
    """Return the number of tokens of each sequence of a sample."""
    if BRANCHES not in sample:
        return [len(sample["input_ids"])]
    shared, (first, *others) = sample[BRANCHES]
    return [shared + first, *others]
