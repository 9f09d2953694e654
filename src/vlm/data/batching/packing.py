"""Packing: samples are concatenated in a row without padding, with the place where each of them starts.

Which samples share a row is decided in `step_layout.py`, or in `best_fit.py`. A sample may branch: several replies
are after one prompt, see `shared_prompt.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, NamedTuple, cast

import numpy as np
import torch

from vlm.data.batching.batch import Batch
from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped

SEQUENCE_STARTS: Final = "cu_seq_lens_q"
"""The key of packed batches that holds where each sample starts, and where the last one ends."""


KEY_INDEX: Final = "key_index"
"""The key of packed batches with shared prompts that holds the tokens that each sample attends to."""

BRANCHES: Final = "branches"
"""The key of a sample that branches: its `Branches`."""


class Branches(NamedTuple):
    """Where a sample branches.

    Attributes:
        shared: the number of the sample's first tokens, which precede each branch.
        lengths: the number of tokens of each branch after them; the first one resumes from there.
    """

    shared: int
    lengths: tuple[int, ...]


class _Sequence(NamedTuple):
    """Tokens of a row that see each other; `shared` tokens at the start of the sequence before it precede them."""

    length: int
    shared: int = 0


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

        No sample predicts the first token of the next one. A dummy image is a sample of its own, and so is each further
        branch of a sample: `key_index` says which tokens precede it.
        """
        branches = [sample.get(BRANCHES) for sample in samples if not isinstance(sample, Skipped)]
        batch: SampleInputs = {**self.collate(list(map(_without_branches, samples)))}
        mask = batch.pop("attention_mask").bool()
        filled = mask | (batch["input_ids"] != self.collate.pad_token_id)  # nothing attends to a dummy
        own, dummies, branches = mask.sum(1).tolist(), (filled & ~mask).sum(1).tolist(), branches or [None]
        rows = zip(own, dummies, branches, strict=True)
        layout = _lay_out([sequence for row in rows for sequence in _split_row(*row)])
        token_inputs = ("input_ids", "labels", LOSS_WEIGHTS, *self.collate.tokens)
        batch |= {name: batch[name][filled][None] for name in token_inputs if name in batch}
        for name in self.collate.rows:
            if name in batch:
                batch[name] = batch[name].flatten(0, 1)[None]  # (rows, images, …) -> (1, rows * images, …)
        batch |= layout
        batch["labels"][0, layout[SEQUENCE_STARTS][:-1].long()] = IGNORE_INDEX
        if BATCH_STATS in batch:
            stats, unseen = batch[BATCH_STATS], sum(map(_count_unseen, branches))
            batch[BATCH_STATS] = replace(
                stats, positions=batch["input_ids"].numel(), squared_lengths=stats.squared_lengths - 2 * unseen
            )
        return cast(Batch, batch)


def _without_branches(sample: SampleInputs | Skipped) -> SampleInputs | Skipped:
    if isinstance(sample, Skipped):
        return sample
    return {name: value for name, value in sample.items() if name != BRANCHES}


def _split_row(own: int, dummy: int, branches: Branches | None) -> Iterator[_Sequence]:
    """Yield the sequences of a sample with so many tokens of its own and of a dummy."""
    if branches is not None:
        yield _Sequence(branches.shared + branches.lengths[0])
        yield from (_Sequence(length, branches.shared) for length in branches.lengths[1:])
    elif own:
        yield _Sequence(own)
    if dummy:
        yield _Sequence(dummy)


def _lay_out(sequences: Sequence[_Sequence]) -> SampleInputs:
    """Return the positions of a row's tokens, where its sequences start, and which keys each of them attends to."""
    lengths = [sequence.length for sequence in sequences]
    seen = [sequence.length + sequence.shared for sequence in sequences]
    starts = [0, *np.cumsum(lengths).tolist()]
    sequence_starts = torch.tensor(starts, dtype=torch.int32)
    layout: SampleInputs = {
        "position_ids": torch.cat([torch.arange(shared, shared + length) for length, shared in sequences])[None],
        SEQUENCE_STARTS: sequence_starts,
        "cu_seq_lens_k": sequence_starts,
        "max_length_q": max(lengths),
        "max_length_k": max(seen),
    }
    if seen != lengths:
        layout["cu_seq_lens_k"] = torch.tensor([0, *np.cumsum(seen)], dtype=torch.int32)
        keys, sample_start = [], 0
        for start, (length, shared) in zip(starts, sequences, strict=False):
            sample_start = sample_start if shared else start
            keys += [torch.arange(sample_start, sample_start + shared), torch.arange(start, start + length)]
        layout[KEY_INDEX] = torch.cat(keys)
    return layout


def _count_unseen(branches: Branches | None) -> int:
    """Return the pairs of tokens of a sample that are in different branches."""
    return 0 if branches is None else sum(one * other for one, other in combinations(branches.lengths, 2))
