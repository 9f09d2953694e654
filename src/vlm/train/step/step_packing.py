"""Packed rows that hold exactly the samples of each optimiser step: `trainer.packing_strategy=step`.

The loader of the same run without packing decides which samples a step has and which of them form a micro-batch. These
samples are laid out in rows, and weights at supervised positions give the average that `trainer.loss_average` names, so
that loss and gradient of a step are those of padded micro-batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers import PreTrainedConfig, TrainingArguments

from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import check_row_capacity
from vlm.data.batching.step_layout import (
    MICRO_BATCH,
    MORE_ROWS,
    MicroBatchCollator,
    Row,
    RowCollator,
    RowDataset,
    SampleCosts,
    get_rows,
    lay_out_step,
)
from vlm.data.counted_later import CountedLater
from vlm.data.dataset import LOSS_WEIGHTS, SampleDataset
from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.feature_cache.families import CachedFamilyDataset
from vlm.data.feature_cache.images import CachedFeatureDataset
from vlm.data.stream import PositionedCollator, PositionedStream, SampleStream
from vlm.train.arguments import loader_options
from vlm.train.monitor.flops import StepFlops
from vlm.train.objectives.base import Collate, Inputs

Item = TypeVar("Item")


class EpochSampler(Sampler[list[Item]]):
    """Follows the batches of an epoch, whose order `set_epoch` chooses.

    Args:
        batches: the batches of all ranks in the order of a run without packing; or, where there are several ranks, the
            wrapper with which accelerate deals them to one of them.
    """

    def __init__(self, batches: BatchSampler | BatchSamplerShard):
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that begins, for the order of samples."""
        sampler = get_inner_sampler(self.batches)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of accumulation steps of this rank."""
        return len(self.batches)


class BatchesOfEpoch(EpochSampler[int]):
    """The batches of this rank, in the order of an epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the samples of each batch."""
        return iter(cast("Iterable[list[int]]", self.batches))


class StepSampler(EpochSampler[Row]):
    """Iterates over this rank's rows of an epoch, accumulation step by accumulation step.

    Each optimiser step has the samples that it has without packing, on all ranks together.

    Args:
        batches: as of `EpochSampler`.
        lengths: number of tokens of each sample.
        costs: cost of each sample.
        accumulation: number of accumulation steps of an optimiser step.
        max_tokens: the most tokens of a row; None: any number.
        measure: called with the indices of a step's samples before their lengths and costs are read; None: all are
            known.

    Raises:
        ValueError: a sample is longer than a row.
    """

    def __init__(
        self,
        batches: BatchSampler | BatchSamplerShard,
        lengths: np.ndarray,
        costs: np.ndarray,
        *,
        accumulation: int,
        max_tokens: int | None = None,
        measure: Callable[[Sequence[int]], object] | None = None,
    ):
        super().__init__(batches)
        self.measure = measure
        self.lengths, self.costs = np.asarray(lengths), costs
        self.accumulation, self.max_tokens = accumulation, max_tokens
        if max_tokens is not None:
            check_row_capacity(self.lengths, max_tokens)

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the rows of each accumulation step of this rank."""
        shard = self.batches if isinstance(self.batches, BatchSamplerShard) else None
        rank, num_ranks = (shard.process_index, shard.num_processes) if shard else (0, 1)
        turns: Iterator[tuple[list[int], ...]]
        turns = _deal(shard) if shard else ((list(batch),) for batch in cast(BatchSampler, self.batches))
        while step := list(islice(turns, self.accumulation)):
            micro_batches = [batch for turn in step for batch in turn]
            if self.measure is not None:
                self.measure(list(chain(*micro_batches)))
            ranks = lay_out_step(
                micro_batches, self.lengths, self.costs, num_ranks=num_ranks, max_tokens=self.max_tokens
            )
            yield from ranks[rank]


class MeasuredSizes:
    """Lengths and costs of samples that are counted while a run trains: those of a step are measured when it comes.

    Args:
        dataset: the samples.
        costs: of samples, by their lengths and images.
        max_tokens: the most tokens of a row; None: any number.

    Attributes:
        lengths: `(samples,)`, 0 where they are not known yet.
        costs: `(samples,)`, likewise.
    """

    def __init__(self, dataset: CountedLater, costs: SampleCosts, max_tokens: int | None):
        self._dataset, self._costs, self._max_tokens = dataset, costs, max_tokens
        self.lengths, self.costs = np.zeros(len(dataset), dtype=np.int64), np.zeros(len(dataset))
        dataset.when_counted(self._take_counts)

    def measure(self, indices: Sequence[int]) -> None:
        """Fill in the lengths and costs of some samples.

        Raises:
            ValueError: a record cannot be used, or a sample is longer than a row.
        """
        if unknown := [index for index in indices if not self.lengths[index]]:
            self._fill(unknown, *np.array([self._dataset.measure(index) for index in unknown]).T)

    def _take_counts(self) -> None:
        self._fill(slice(None), self._dataset.lengths, self._dataset.num_images)

    def _fill(self, places: Sequence[int] | slice, lengths: np.ndarray, num_images: np.ndarray) -> None:
        if self._max_tokens is not None:
            check_row_capacity(lengths, self._max_tokens)
        self.lengths[places], self.costs[places] = lengths, self._costs.of(lengths, num_images)


def get_inner_sampler(batches: BatchSampler | BatchSamplerShard) -> Any:
    """Return the sampler that orders the samples of batches, of this rank or of all."""
    own: object = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
    return own.sampler


@dataclass
class _Batches:
    """Batches as `BatchSamplerShard` takes them; it appends to a last one that is short."""

    batches: Iterator[list[int]]
    batch_size: int | None
    drop_last: bool

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)


def _deal(shard: BatchSamplerShard) -> Iterator[tuple[list[int], ...]]:
    """Yield the batches of all ranks, accumulation step by accumulation step, as accelerate deals them."""
    shards = []
    for rank, batches in enumerate(tee(shard.batch_sampler, shard.num_processes)):
        shards.append(copy(shard))
        shards[rank].process_index = rank
        shards[rank].batch_sampler = cast(BatchSampler, _Batches(batches, shard.batch_size, shard.drop_last))
    return zip(*shards, strict=True)


class StepPacking:
    """What packed steps add to a run: a loader of their own, and the weights of the losses.

    Args:
        collate: makes padded batches.
        costs: balances the rows.
        max_tokens: `trainer.max_tokens_per_batch`.
        loss_average: `token` or `micro_batch`.
        args: the run's.
        gather: returns `(ranks, N)` of all ranks for `(1, N)` of this one.
    """

    def __init__(
        self,
        collate: Collator,
        costs: SampleCosts,
        max_tokens: int | None,
        loss_average: str,
        args: TrainingArguments,
        gather: Callable[[Tensor], Tensor],
    ):
        self.collate, self.costs, self.max_tokens = RowCollator(collate), costs, max_tokens
        self.loss_average, self.args, self.gather = loss_average, args, gather
        self.sampler: StepSampler | BatchesOfEpoch | None = None

    def make_empty_row(self) -> Inputs:
        """Return a row without samples."""
        return dict(self.collate([[]]))

    def make_loader(self, padded: DataLoader, dataset: SampleDataset | SampleStream) -> DataLoader:
        """Return the loader of this rank's rows, in as many accumulation steps as `padded` has batches.

        A row of a stream holds samples of a single micro-batch, since lengths are not known beforehand.

        Raises:
            ValueError: a sample does not fit into a row, or accelerate's settings deal batches to ranks in another way.
        """
        if isinstance(dataset, SampleStream):
            if self.max_tokens is not None:
                check_stream_capacity(dataset, self.max_tokens)
            collate = MicroBatchCollator(self.collate, self.costs, self.max_tokens)
            return DataLoader(
                PositionedStream(dataset), padded.batch_size, collate_fn=PositionedCollator(collate),
                **loader_options(self.args),
            )  # fmt: skip
        batches: Any = padded.batch_sampler
        if self.args.world_size > 1 and not (isinstance(batches, BatchSamplerShard) and batches.even_batches):
            raise ValueError(
                f"trainer.accelerator_config={self.args.accelerator_config}: packed steps need dispatch_batches=false "
                "and even_batches=true; leave them out, or choose trainer.packing_strategy=best_fit"
            )
        if self.args.world_size > 1 and type(get_inner_sampler(batches)) is RandomSampler:
            raise ValueError(
                "trainer.accelerator_config.use_seedable_sampler=false: each rank would shuffle packed steps in its "
                "own order; leave it out, or choose trainer.packing_strategy=best_fit"
            )
        if isinstance(dataset, CountedLater) and not dataset.is_counted:
            sizes = MeasuredSizes(dataset, self.costs, self.max_tokens)
            lengths, costs, measure = sizes.lengths, sizes.costs, sizes.measure
        else:
            lengths, measure = np.asarray(dataset.lengths), None
            costs = self.costs.of(lengths, np.asarray(dataset.num_images))
        self.sampler = StepSampler(
            batches,
            lengths,
            costs,
            accumulation=self.args.gradient_accumulation_steps,
            max_tokens=self.max_tokens,
            measure=measure,
        )
        rows = RowDataset(dataset)
        return DataLoader(rows, batch_sampler=self.sampler, collate_fn=self.collate, **loader_options(self.args))

    def finish_batches(self, batches: Sequence[Inputs]) -> Tensor:
        """Give the batches of a step equally many rows on every rank, and the weights of their losses.

        Returns:
            The number of supervised tokens of the step on all ranks, by which the weighted sum of losses is divided.
        """
        if self.sampler is None and self.max_tokens is not None:
            self.add_empty_rows(batches)
        return weigh_losses(batches, self.loss_average, self.args, self.gather)

    def add_empty_rows(self, batches: Sequence[Inputs]) -> None:
        """Add rows without samples, where the number of rows depends on the samples of each rank."""
        numbers = [len(get_rows(batch)) for batch in batches]
        most = self.gather(torch.tensor([numbers], device=self.args.device)).amax(0).tolist()
        for batch, number, wanted in zip(batches, numbers, most, strict=True):
            if wanted > number:
                empty = [self.make_empty_row() for _ in range(wanted - number)]
                batch[MORE_ROWS] = [*batch.get(MORE_ROWS, ()), *empty]


class MicroBatchPacking(StepPacking):
    """What packed steps add to a run whose objective makes the rows of each micro-batch, and counts their items.

    Args:
        collate: makes the rows of a micro-batch.
        max_tokens: `trainer.max_tokens_per_batch`.
        count_items: returns how many items of a row the loss of a step is a mean over.
        args: the run's.
        gather: returns `(ranks, N)` of all ranks for `(1, N)` of this one.
    """

    def __init__(
        self, collate: Collate, max_tokens: int | None, count_items: Callable[[Inputs], Tensor | None],
        args: TrainingArguments, gather: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self.collate, self.max_tokens, self.count_items = collate, max_tokens, count_items
        self.args, self.gather = args, gather
        self.sampler: StepSampler | BatchesOfEpoch | None = None

    def make_loader(self, padded: DataLoader, dataset: SampleDataset | SampleStream) -> DataLoader:
        """Return a loader of the batches of `padded`, in rows."""
        self.sampler = BatchesOfEpoch(cast(BatchSampler, padded.batch_sampler))
        return DataLoader(dataset, batch_sampler=self.sampler, collate_fn=self.collate, **loader_options(self.args))

    def make_empty_row(self) -> Inputs:
        """Return a row without samples."""
        return dict(self.collate([]))

    def finish_batches(self, batches: Sequence[Inputs]) -> Tensor:
        """Give the batches of a step equally many rows on every rank; return the number of items of the step."""
        if self.max_tokens is not None:
            self.add_empty_rows(batches)
        counts = [self.count_items(row) for batch in batches for row in get_rows(batch)]
        numbers = [number for number in counts if number is not None]
        assert len(numbers) == len(counts), "an objective that makes rows counts their items"
        return self.gather(torch.stack(numbers).sum().reshape(1, 1).to(self.args.device)).sum()


def weigh_losses(
    batches: Sequence[Inputs], loss_average: str, args: TrainingArguments, gather: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sum of the weights of a step's supervised tokens on all ranks; for `micro_batch`, weigh its rows.

    The weight of a token is that of its reply, 1 where it has none. With n the sum of the step, n_m that of the
    micro-batch m of M, each weight is multiplied with n / (n_m M): the weighted sum of losses over the step, divided by
    n, is the mean of the means. A micro-batch without supervised tokens contributes 0, as it does padded.

    Args:
        batches: the batches of the step on this rank. `MICRO_BATCH` is taken out of their rows; a row without it
            belongs to the micro-batch of this rank in its accumulation step.
        loss_average: `token` or `micro_batch`.
        args: the run's.
        gather: returns `(ranks, M)` of all ranks for `(1, M)` of this one.
    """
    num_micro_batches = len(batches) * args.world_size
    sums = torch.zeros(num_micro_batches)
    rows: list[tuple[Inputs, Tensor]] = []
    for step, batch in enumerate(batches):
        for row in get_rows(batch):
            labels = row["labels"]
            micro_batches = row.pop(MICRO_BATCH, None)
            if micro_batches is None:
                micro_batches = torch.full_like(labels, step * args.world_size + args.process_index)
            is_supervised = labels[:, 1:] != IGNORE_INDEX
            sums.index_add_(0, micro_batches[:, 1:][is_supervised], supervised_weights(row))
            rows.append((row, micro_batches))
    sums = gather(sums[None].to(args.device)).view(-1, num_micro_batches).sum(0)
    number = sums.sum()
    if loss_average == "micro_batch":
        factors = number / (sums.where(sums > 0, 1) * num_micro_batches)
        for row, micro_batches in rows:  # on the device, which the host does not wait for
            factor = factors[micro_batches.to(factors.device, non_blocking=True)]
            own = row.get(LOSS_WEIGHTS)
            row[LOSS_WEIGHTS] = factor if own is None else factor * own.to(factor.device, non_blocking=True)
    return number


def supervised_weights(batch: Inputs) -> Tensor:
    """Return the weight of each supervised token that is predicted, 1 without weights: `(S,)`, float32."""
    is_supervised = batch["labels"][:, 1:] != IGNORE_INDEX
    if (weights := batch.get(LOSS_WEIGHTS)) is None:
        return torch.ones(int(is_supervised.sum()), device=is_supervised.device)
    return weights[:, 1:][is_supervised]


@contextmanager
def without_gradient_exchange(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Let gradients add up on this rank alone, as between two accumulation steps."""
    before = accelerator.sync_gradients
    accelerator.sync_gradients = False  # what DeepSpeed's engine is told
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        with nullcontext() if is_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = before


def check_stream_capacity(stream: SampleStream, max_tokens: int) -> None:
    """Check that every sample of a stream fits into a row.

    Raises:
        ValueError: a sample may be longer than `max_tokens`.
    """
    longest = max(source.encoder.longest for source in stream.sources)
    if max_tokens < longest:
        raise ValueError(
            f"trainer.max_tokens_per_batch={max_tokens}: a sample of the stream may have {longest:,} tokens; raise it, "
            "or lower dataset.max_length"
        )


def sample_costs(flops: StepFlops | None, config: PreTrainedConfig, dataset: object) -> SampleCosts:
    """Return what samples cost: the operations of the model where they are counted, else an estimate for its text.

    A layer of a transformer of width D needs about 24 D² operations a token in its matrices, and 4 D for each pair.
    """
    if flops is None:
        return SampleCosts(token=6.0 * config.get_text_config().hidden_size, pair=1.0)
    encoded = 0.0 if isinstance(dataset, CachedFeatureDataset | CachedFamilyDataset) else flops.encoded
    return SampleCosts(flops.token, flops.pair, encoded + flops.connected)
