"""A `Trainer` that makes the batches of a run: the loader and its order, packed rows, and what is counted in a step."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm.assembly.packed_rows import add_grid_positions
from vlm.config.choices import BEST_FIT, GROUPED_STRATEGIES
from vlm.config.schema import TrainerOptions
from vlm.data.batching.best_fit import PackSampler
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY
from vlm.data.batching.stats import BATCH_STATS, BatchStats
from vlm.data.batching.step_layout import get_rows
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.processor import Processor
from vlm.data.skipped import Skipped
from vlm.data.stream import PositionedCollator, PositionedStream, SampleStream
from vlm.train.arguments import loader_options, sampler_seed
from vlm.train.data import make_grouped_sampler
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.evaluation_batches import iterate_batches
from vlm.train.interruptible import InterruptibleTrainer
from vlm.train.monitor.speed import SpeedMeter, count_images
from vlm.train.objectives.base import Collate, Inputs, Objective, PreparedRun
from vlm.train.random_state import with_own_generator
from vlm.train.signals import ignore_signals_in_workers
from vlm.train.step.best_fit_loader import make_best_fit_loader
from vlm.train.step.packing import make_step_packing
from vlm.train.step.step_packing import BatchesOfEpoch, StepPacking, StepSampler, supervised_weights
from vlm.train.stream_positions import StreamEpoch, StreamPositions

NumItems = Tensor | int | None
"""Supervised tokens of a step on all ranks, each as often as its weight says; None: losses are averaged by micro-batch,
each of them a batch."""


class BatchTrainer(InterruptibleTrainer):
    """A trainer whose samples are grouped, packed or streamed as `trainer` and `dataset` keys say.

    A subclass calls `set_up_batches` when the attributes up to `packing` are set.

    Attributes:
        objective: may have an order of its own for samples.
        meter: times the steps and adds up their batch statistics.
        processor: normalises pixels on the device.
        options: the run's `trainer` keys.
        packing: whether rows are packed.
        on_skipped: called with the records that a batch leaves out, and the number of its samples.
        sampler: the order of the samples; None: the one of `Trainer`, or of a stream.
        step_packing: packs the samples of a whole step; None: nothing does.
        stream_positions: where each worker is in a stream; None: the run reads none.
    """

    # `Trainer` declares these as unions, as those of its bases.
    train_dataset: Any
    data_collator: Any

    objective: Objective
    meter: SpeedMeter
    processor: Processor
    options: TrainerOptions
    packing: bool
    on_skipped: Callable[[list[Skipped], int], None]
    sampler: Sampler[int] | PackSampler | StepSampler | BatchesOfEpoch | None = None
    step_packing: StepPacking | None = None
    stream_positions: StreamPositions | None = None

    def set_up_batches(self, run: PreparedRun, on_skipped: Callable[[list[Skipped], int], None]) -> None:
        """Decide how the batches of a run are made."""
        self.on_skipped = on_skipped
        if isinstance(run.data.train, SampleStream):
            self.stream_positions = StreamPositions(run.data.train, self.args)
            self.saved_with_checkpoint.append(self.stream_positions)
            self.add_callback(StreamEpoch())
        if self.packing and self.options.packing_strategy != BEST_FIT:
            flops = broadcast_from_rank0(self.meter.flops)
            self.step_packing = make_step_packing(run, self.objective, flops, self.accelerator.gather)
            self.model_accepts_loss_kwargs = False  # `StepPacking` counts supervised tokens in place of `Trainer`
            self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader:
        """As usual, or packed; streams are shared out to ranks, and their records to workers, beforehand."""
        args, dataset, collate = self.args, self.train_dataset, self.data_collator
        if self.packing and self.step_packing is None:
            loader, self.sampler = make_best_fit_loader(dataset, collate, self.options.max_tokens_per_batch, args)
        elif isinstance(dataset, SampleStream):
            collate = PositionedCollator(collate)
            loader = DataLoader(
                PositionedStream(dataset), args.train_batch_size, collate_fn=collate, **loader_options(args)
            )
        else:
            loader = super().get_train_dataloader()
        if self.step_packing is not None:
            loader = self.step_packing.make_loader(loader, dataset)
            self.sampler = self.step_packing.sampler
        return with_own_generator(ignore_signals_in_workers(loader), sampler_seed(args))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Return samples grouped by modality and length, or in the objective's order, or else as usual."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if (strategy := self.options.train_sampling_strategy) in GROUPED_STRATEGIES:
            self.sampler = make_grouped_sampler(strategy, dataset, self.args)
        else:
            self.sampler = self.objective.make_train_sampler(self, dataset)
        return super()._get_train_sampler(dataset) if self.sampler is None else self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], NumItems]:
        """As usual, timed; what a batch says of itself is taken out of it."""
        self.meter.begin_step()
        batches, number = super().get_batch_samples(self.meter.time_waits(epoch_iterator), num_batches, device)
        if self.stream_positions is not None:
            self.stream_positions.take(batches)
        if self.step_packing is not None:
            number = self.step_packing.finish_batches(batches)
        counts, refs = [], []
        for batch in chain.from_iterable(map(get_rows, batches)):
            self._check_weights(batch)
            refs.append(batch.pop(SAMPLE_REFS, []))
            stats = batch.pop(BATCH_STATS, None) or BatchStats(samples=len(batch[self.objective.row_key]))
            counts.append((stats, *count_images(self.model, batch, stats)))
            self.on_skipped(batch.pop(SKIPPED_KEY, []), stats.samples)
            if self.packing:
                batch |= add_grid_positions(self.model, batch)
        self.meter.add(counts)
        self.guard.begin_step(self.state.global_step + 1, refs)
        self.logged_loss.begin_step(self._tr_loss)
        # All records of a step may have been left out.
        return batches, number.where(number > 0, 1) if isinstance(number, Tensor) else number

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> NumItems:
        """Count what the objective counts; a supervised token of a reply with a weight counts as often as that says."""
        is_text = bool(batch_samples) and isinstance(batch_samples[0].get("labels"), Tensor)
        if not (self.model_accepts_loss_kwargs and is_text):
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = [
            supervised_weights(batch).sum() if (count := self.objective.count_items(batch)) is None else count
            for batch in batch_samples
        ]
        number = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            number = self.accelerator.gather(number).sum()
        return number

    def _check_weights(self, batch: Inputs) -> None:
        """Raise ValueError where replies have weights, which the objective does not take."""
        if LOSS_WEIGHTS in batch and not self.objective.takes_loss_weights:
            raise ValueError(
                f"trainer.objective={self.options.objective}: it does not weight losses "
                "(Objective.takes_loss_weights), but turns of the records have a `weight` or `loss` other than 0 and "
                "1; leave these out"
            )

    def _prepare_inputs(self, inputs: Inputs) -> Inputs:
        """As usual, copied while the device computes; pixels are normalised there, if workers left that to it."""
        self.mark_progress()
        copied: Any = send_to_device(inputs, self.args.device, non_blocking=self.args.dataloader_pin_memory)
        weights = {name: copied.pop(name) for name in (LOSS_WEIGHTS,) if name in copied}  # DeepSpeed would round them
        inputs = {**super()._prepare_inputs(copied), **weights}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.processor.normalise(inputs["pixel_values"])
        return inputs

    def _track_num_input_tokens(self, inputs: Inputs) -> None:
        """As usual, row by row."""
        for row in get_rows(inputs):
            super()._track_num_input_tokens(row)

    def evaluation_batches(
        self, dataset: Dataset[object], title: str, collate: Collate | None = None
    ) -> Iterator[Inputs]:
        """Yield the batches of a data set as the model takes them; the model is set to evaluate."""
        self.model.eval()
        yield from iterate_batches(self, dataset, title, collate)
