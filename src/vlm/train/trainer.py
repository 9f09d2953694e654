"""A thin subclass of transformers' `Trainer`: parts as optimiser groups, two loss averages, and an objective.

It adds, and nothing else: one optimiser group for each part and decay class; LLaVA's mean of micro-batch means beside
the mean over tokens; grouping by modality and length; packed rows; the loss and the evaluation of the run's objective;
the speed of the run; checkpoints that hold what trains (`checkpoints/`). `hooks.py` lists the methods it overrides.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import DataCollator, TrainerCallback
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.utils import ModelOutput

from vlm.assembly.adapter_base import make_base
from vlm.config.choices import BEST_FIT, GROUPED_STRATEGIES
from vlm.data.batching.best_fit import PackSampler
from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY
from vlm.data.batching.stats import BATCH_STATS, BatchStats
from vlm.data.batching.step_layout import MORE_ROWS, get_rows
from vlm.data.dataset import Skipped
from vlm.data.stream import PositionedCollator, PositionedStream, SampleStream
from vlm.train.arguments import loader_options, sampler_seed
from vlm.train.checkpoints.best import BestModel
from vlm.train.checkpoints.saving import FinishSaving
from vlm.train.checkpoints.world import World
from vlm.train.data import make_grouped_sampler
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.evaluation_batches import iterate_batches
from vlm.train.hooks import check_hooks
from vlm.train.interruptible import InterruptibleTrainer
from vlm.train.monitor.speed import SpeedCallback, SpeedMeter, count_images
from vlm.train.objectives.base import Inputs, Objective, PreparedRun
from vlm.train.optimizers import make_optimizer, read_learning_rates
from vlm.train.random_state import separate_random_state, with_own_generator
from vlm.train.signals import ignore_signals_in_workers
from vlm.train.step.before_first_step import BeforeFirstStep
from vlm.train.step.best_fit_loader import make_best_fit_loader
from vlm.train.step.packed_attention import use_packed_attention
from vlm.train.step.packing import add_grid_positions, make_step_packing
from vlm.train.step.step_packing import LOSS_WEIGHTS, StepPacking, StepSampler, without_gradient_exchange
from vlm.train.stop_on_signal import EvaluateWhenDue, StopOnSignal
from vlm.train.stream_positions import StreamEpoch, StreamPositions

NumItems = Tensor | int | None
"""Supervised tokens of a step on all ranks; None: losses are averaged by micro-batch, each of them a batch."""

DROPPED_METRICS = ("train_samples_per_second", "train_steps_per_second", "total_flos")
"""What `Trainer` logs at the end: evaluation and saving in the time, and operations guessed from the parameters."""


@check_hooks
class VLMTrainer(InterruptibleTrainer):
    """Trains a model whose parts have learning rates of their own.

    `on_first_batch` is called with the first batch of this rank, before its forward pass; `on_skipped` with the records
    that a batch leaves out, and the number of its samples.
    """

    # `Trainer` declares these as unions, as those of its bases.
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *,
        objective: Objective,
        run: PreparedRun,
        meter: SpeedMeter,
        on_first_batch: Callable[[Inputs], None] | None,
        on_skipped: Callable[[list[Skipped], int], None],
        callbacks: Sequence[TrainerCallback],
        stop_on_signal: StopOnSignal,
    ):
        super().__init__(
            model=run.model,
            args=run.args,
            data_collator=cast(DataCollator, run.collate),
            train_dataset=run.data.train,
            eval_dataset=run.data.evaluation,
            processing_class=run.processor.tokenizer,
            callbacks=[BeforeFirstStep(self, run.model), *callbacks, FinishSaving(self), stop_on_signal],
        )
        self.objective, self.meter = objective, meter
        self.stop_on_signal = stop_on_signal
        stop_on_signal.finish_saving = self.finish_saving
        self.processor, self.parts, self.base = run.processor, run.parts, make_base(objective.config)
        self.options = objective.config.trainer
        self.world = World.of(objective.config, run.args.world_size, objective.loss_average)
        # transformers leaves a model that is sharded as it is; FSDP2 shards it once everything else is prepared.
        self.is_distributed_loading_by_transformers = self.is_sharded = self.options.sharding is not None
        self.set_up_guards(objective.config)
        self.saved_with_checkpoint = [self.guard, stop_on_signal]
        self.best_model = BestModel.of_run(self.options, objective.metric_names(), is_writer=self.args.should_save)
        if self.best_model is not None:
            self.saved_with_checkpoint.append(self.best_model)
        self.stream_positions: StreamPositions | None = None
        if isinstance(run.data.train, SampleStream):
            self.stream_positions = StreamPositions(run.data.train, self.args)
            self.saved_with_checkpoint.append(self.stream_positions)
            self.add_callback(StreamEpoch())
        self.packing = self.options.packing
        self.on_first_batch, self.on_skipped = on_first_batch, on_skipped
        self.sampler: Sampler[int] | PackSampler | StepSampler | None = None
        # Without a number of items, `Trainer` averages the losses of micro-batches over accumulation steps and ranks.
        # What a family's own `forward` accepts says nothing: its loss is not used.
        self.model_accepts_loss_kwargs = objective.loss_average == "token"
        self.step_packing: StepPacking | None = None
        if self.packing and self.options.packing_strategy != BEST_FIT:
            flops = broadcast_from_rank0(self.meter.flops)
            self.step_packing = make_step_packing(run, objective, flops, self.accelerator.gather)
            self.model_accepts_loss_kwargs = False  # `StepPacking` counts supervised tokens in place of `Trainer`
            self.loss_is_scaled_for_ga = True

    # --- the run ------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: None = None, ignore_keys_for_eval: None = None
    ) -> TrainOutput:
        """As usual, timed; a run that fails listens to signals as the process did before it."""
        self.add_callback(SpeedCallback(self.meter))  # the last one: others may ask for an evaluation or a checkpoint
        self.add_callback(EvaluateWhenDue(self))
        with self.within_guards(), self.stoppable():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[object]:
        """Return the run's precision; `Trainer` has it around calls of the whole model alone."""
        return self.accelerator.autocast()

    # --- optimisation -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the chosen optimiser over the groups of the parts, see `optimizers`."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = make_optimizer(self.args, self.model, self.parts, decayed)
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            groups = self.optimizer.param_groups
            self.optimized_names = [names[id(parameter)] for group in groups for parameter in group["params"]]
            self.new_groups = [{name: group[name] for name in group if name != "params"} for group in groups]
        return self.optimizer

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[object]:
        """Reduce gradients after each micro-batch: whole ones would take the memory that FSDP2 frees."""
        return nullcontext()

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: NumItems = None) -> Tensor:
        """As usual, row by row where they are several; the first batch is shown to `on_first_batch`."""
        *rows, last = [{name: value for name, value in row.items() if name != MORE_ROWS} for row in get_rows(inputs)]
        if self.on_first_batch is not None:
            self.on_first_batch(rows[0] if rows else last)
            self.on_first_batch = None
        attention = use_packed_attention(self.model.config.get_text_config()) if self.packing else nullcontext()
        with attention:
            losses = []
            for row in rows:
                with without_gradient_exchange(self.accelerator, model):
                    losses.append(super().training_step(model, row, num_items_in_batch))
            return sum(losses, super().training_step(model, last, num_items_in_batch))

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return the objective's loss of a batch."""
        loss, outputs = self.objective.compute_loss(self, model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the number is that of all ranks, which average gradients
        loss = self.guard.watch_loss(loss, is_share=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As usual, with each part's learning rate and the speed since the last log; at the end, the whole speed."""
        self.correct_logs(logs)
        if "loss" in logs or "learning_rate" in logs:
            if self.lr_scheduler is not None:
                logs.pop("learning_rate", None)
                logs |= read_learning_rates(self.optimizer, self.lr_scheduler.get_last_lr())
            logs |= self.meter.gather_metrics(self.accelerator.gather) | self.objective.training_metrics(self)
        elif "train_runtime" in logs:
            self.meter.finish(self.accelerator.gather, self.state.global_step)
            for name in DROPPED_METRICS:
                logs.pop(name, None)
        super().log(logs)  # without the start, from which `Trainer` would log a second number of tokens a second

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Return 0: `SpeedMeter` counts them, and by more than the number of parameters."""
        return 0

    # --- data ---------------------------------------------------------------------------------------------------

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
        return batches, number.clamp(min=1) if isinstance(number, Tensor) else number

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

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the objective's metrics, each name with `eval_` before it, and log them."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        start = time.time()
        self.stop_on_signal.interrupt_evaluation(self.args.device)
        with separate_random_state(self.args.seed + self.state.global_step):
            values = self.objective.evaluate(self, dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.note_evaluation(metrics)
        return metrics

    def evaluation_batches(
        self, dataset: Dataset[object], title: str, collate: Callable[[Sequence[Any]], Any] | None = None
    ) -> Iterator[Inputs]:
        """Yield the batches of a data set as the model takes them; the model is set to evaluate."""
        self.model.eval()
        yield from iterate_batches(self, dataset, title, collate)
