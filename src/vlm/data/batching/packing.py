"""Packing: samples concatenated in a row without padding, and where each of them starts.

Which samples share a row is decided in `step_layout.py`, or in `best_fit.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
import torch

from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.dataset import LOSS_WEIGHTS, Skipped
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import SampleInputs

SEQUENCE_STARTS: Final = "cu_seq_lens_q"
"""The key of packed batches that holds where each sample starts, and where the last one ends."""


def check_row_capacity(lengths: np.ndarray, capacity: int) -> None:
    """Check that every sample fits into a row of at most `capacity` tokens.

    Raises:
        ValueError: a sample is longer.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(
            f"a sample of {lengths.max():,} tokens does not fit into trainer.max_tokens_per_batch={capacity}; raise "
            "it, or lower dataset.max_length and choose dataset.over_length=skip or truncate"
        )


@dataclass(eq=False)
class PackingCollator:
    """Concatenates samples in a single row, and tells attention where each starts.

    Attributes:
        collate: collates the inputs of images, and adds the dummies that a batch needs.
    """

    collate: Collator

    def __call__(self, samples: Sequence[SampleInputs | Skipped]) -> Batch:
        """Collate samples: `input_ids`, `labels` and `position_ids` `(1, tokens)`, and where samples start.

        No sample predicts the first token of the next one. A dummy image is a sample of its own.
        """
        batch: SampleInputs = {**self.collate(samples)}
        mask = batch.pop("attention_mask").bool()
        filled = mask | (batch["input_ids"] != self.collate.pad_token_id)  # nothing attends to a dummy
        rows = zip(mask.sum(1).tolist(), (filled & ~mask).sum(1).tolist(), strict=True)
        lengths = [length for lengths in rows for length in lengths if length]
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        token_inputs = ("input_ids", "labels", LOSS_WEIGHTS, *self.collate.tokens)
        batch |= {name: batch[name][filled][None] for name in token_inputs if name in batch}
        for name in self.collate.rows:
            if name in batch:
                batch[name] = batch[name].flatten(0, 1)[None]  # (rows, images, …) -> (1, rows * images, …)
        batch |= {
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        batch["labels"][0, starts[:-1].long()] = IGNORE_INDEX
        if BATCH_STATS in batch:
            batch[BATCH_STATS] = replace(batch[BATCH_STATS], positions=batch["input_ids"].numel())
        return cast(Batch, batch)
