"""Batches of preferences: a row for each side, first the chosen ones, then the rejected ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import torch

from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY, Collator
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.encoding.preference import CHOSEN, MISMATCHED, REJECTED
from vlm.data.preference.dataset import PreferenceItem
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped

ROLES: Final = "roles"
"""The key of the role of each row: `(rows,)`, int64."""
RECORDS: Final = "records"
"""The key of the place in the batch of each row's record: `(rows,)`, int64."""
RECORD_INDEX: Final = "record_index"
"""The key of the index in the data set of each record of the batch: `(records,)`, int64."""
SEQUENCES: Final = "sequences"
"""The key of the number of each token's conversation in packed rows: `(1, tokens)`, int64. There, `roles` and `records`
are of conversations, and not of rows."""
PREFERENCE_KEYS = (ROLES, RECORDS, RECORD_INDEX, SEQUENCES)
"""Keys of a batch that no model reads."""


@dataclass(frozen=True, eq=False)
class PreferenceCollator:
    """Makes batches of `PreferenceDataset` items.

    Attributes:
        collate: makes rows of conversations.
    """

    collate: Collator

    def __call__(self, items: Sequence[PreferenceItem | Skipped]) -> Batch:
        """Return a batch with `roles`, `records` and `record_index`; its rows are in the order of their roles.

        Where every record was left out, there is one row, which is of no record, and the three are empty.
        """
        records = [item for item in items if not isinstance(item, Skipped)]
        rows: list[SampleInputs] = []
        roles: list[int] = []
        places: list[int] = []
        for role in (CHOSEN, REJECTED, MISMATCHED):
            for place, item in enumerate(records):
                for inputs, own in zip(item["sides"], item["roles"], strict=True):
                    if own == role:
                        rows.append(inputs)
                        roles.append(role)
                        places.append(place)
        batch = cast("dict[str, object]", self.collate(rows))
        batch[ROLES], batch[RECORDS] = torch.tensor(roles, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
        batch[RECORD_INDEX] = torch.tensor([item["index"] for item in records], dtype=torch.int64)
        batch[SAMPLE_REFS] = [item["ref"] for item in records]
        if stats := batch.get(BATCH_STATS):
            batch[BATCH_STATS] = replace(stats, samples=len(records))  # pyright: ignore[reportArgumentType] - a dict of all kinds
        if skipped := [item for item in items if isinstance(item, Skipped)]:
            batch[SKIPPED_KEY] = skipped
        return cast(Batch, batch)
