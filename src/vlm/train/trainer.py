"""A thin subclass of transformers' `Trainer`: parts as optimiser groups, two loss averages, and an objective.

It adds, and nothing else: one optimiser group for each part and decay class; LLaVA's mean of micro-batch means beside
the mean over tokens; the loss and the evaluation of the run's objective; the speed of the run. Its bases make batches
(`batches.py`), stop and resume (`interruptible.py`), guard updates (`guards/`), and write and read checkpoints
(`checkpoints/`). `hooks.py` lists the methods of `Trainer` that are overridden.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollator, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.utils import ModelOutput

from vlm.assembly.adapter_base import make_base
from vlm.assembly.packed_attention import use_packed_attention
from vlm.data.batching.packing import KEY_INDEX
from vlm.data.batching.step_layout import MORE_ROWS, get_rows
from vlm.data.skipped import Skipped
from vlm.runs.status_line import EVALUATING
from vlm.train.batches import BatchTrainer, NumItems
from vlm.train.checkpoints.best import BestModel
from vlm.train.checkpoints.saving import FinishSaving
from vlm.train.checkpoints.world import World
from vlm.train.hooks import check_hooks
from vlm.train.monitor.part_updates import PartUpdates
from vlm.train.monitor.progress_line import ProgressLine
from vlm.train.monitor.source_losses import make_source_losses
from vlm.train.monitor.speed import SpeedCallback, SpeedMeter
from vlm.train.monitor.trackers import tracked_run
from vlm.train.objectives.base import Inputs, Objective, PreparedRun
from vlm.train.optimizers import make_optimizer, read_learning_rates
from vlm.train.random_state import separate_random_state
from vlm.train.step.before_first_step import BeforeFirstStep
from vlm.train.step.step_packing import without_gradient_exchange
from vlm.train.stop_on_signal import EvaluateWhenDue, StopOnSignal
from vlm.train.weight_average import WeightAverage

DROPPED_METRICS = ("train_samples_per_second", "train_steps_per_second", "total_flos")
"""What `Trainer` logs at the end: evaluation and saving in the time, and operations guessed from the parameters."""


@check_hooks
class VLMTrainer(BatchTrainer):
    """Trains a model whose parts have learning rates of their own.

    `on_first_batch` is called with the first batch of this rank, before its forward pass; `on_skipped` with the records
    that a batch leaves out, and the number of its samples.
    """

    eval_dataset: Any  # `Trainer` declares it as a union, as its bases do

    def __init__(
        self,
        *,
        objective: Objective,
        run: PreparedRun,
        meter: SpeedMeter,
        on_first_batch: Callable[[Inputs], None] | None,
        on_skipped: Callable[[list[Skipped], int], None],
        callbacks: Sequence[TrainerCallback],
        progress: ProgressLine,
        stop_on_signal: StopOnSignal,
    ):
        super().__init__(
            model=run.model,
            args=run.args,
            data_collator=cast(DataCollator, run.collate),
            train_dataset=run.data.train,
            eval_dataset=run.data.evaluation,
            processing_class=run.processor.tokenizer,
            callbacks=[BeforeFirstStep(self, run.model), *callbacks, progress, FinishSaving(self), stop_on_signal],
        )
        for shown_by_transformers in (ProgressCallback, PrinterCallback):  # `progress` takes their place
            self.remove_callback(shown_by_transformers)
        self.progress, self.status = progress, run.status
        self.objective, self.meter = objective, meter
        self.options, self.packing = objective.config.trainer, objective.config.trainer.packing
        self.stop_on_signal = stop_on_signal
        stop_on_signal.finish_saving = self.finish_saving
        self.processor, self.parts, self.base = run.processor, run.parts, make_base(objective.config)
        self.world = World.of(objective.config, run.args.world_size, objective.loss_average)
        # transformers leaves a model that is sharded as it is; FSDP2 shards it once everything else is prepared.
        self.is_distributed_loading_by_transformers = self.is_sharded = self.options.sharding is not None
        self.set_up_guards(objective.config)
        self.saved_with_checkpoint = [self.guard, stop_on_signal]
        self.best_model = BestModel.of_run(self.options, objective.metric_names(), is_writer=self.args.should_save)
        if self.best_model is not None:
            self.saved_with_checkpoint.append(self.best_model)
        self.average = self._keep_average(run.model)
        self.source_losses = make_source_losses(
            run.data.records["train"], lambda: self.guard.step.next_refs, run.args.device
        )
        if self.source_losses is not None:
            objective.watch_losses = self.source_losses.add
        self.part_updates = PartUpdates(self)
        self.add_callback(self.part_updates)
        self.on_first_batch = on_first_batch
        # Without a number of items, `Trainer` averages the losses of micro-batches over accumulation steps and ranks.
        # What a family's own `forward` accepts says nothing: its loss is not used.
        self.model_accepts_loss_kwargs = objective.loss_average == "token"
        self.set_up_batches(run, on_skipped)

    def _keep_average(self, model: nn.Module) -> WeightAverage | None:
        """Return what keeps the average of the weights; None: nothing does."""
        if self.options.average_decay is None:
            return None
        average = WeightAverage(model, self.options.average_decay, is_writer=self.args.should_save)
        self.saved_with_checkpoint.append(average)
        self.add_callback(average)
        return average

    # --- the run ------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: None = None, ignore_keys_for_eval: None = None
    ) -> TrainOutput:
        """As usual, timed; a run that fails listens to signals as the process did before it."""
        self.add_callback(SpeedCallback(self.meter))  # the last one: others may ask for an evaluation or a checkpoint
        self.add_callback(EvaluateWhenDue(self))
        tracked = tracked_run(self.callback_handler, is_writer=self.args.process_index == 0)
        with self.within_guards(), self.stoppable(), closing(self.progress), tracked:
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
        config, shares = self.model.config.get_text_config(), any(KEY_INDEX in row for row in (*rows, last))
        with use_packed_attention(config, shares_prompts=shares) if self.packing else nullcontext():
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
            logs |= self.part_updates.pop_metrics()
            if self.source_losses is not None:
                logs |= self.source_losses.pop_metrics(self.accelerator.gather)
            logs |= self.meter.gather_metrics(self.accelerator.gather) | self.objective.training_metrics(self)
        elif "train_runtime" in logs:
            self.meter.finish(self.accelerator.gather, self.state.global_step)
            for name in DROPPED_METRICS:
                logs.pop(name, None)
        super().log(logs)  # without the start, from which `Trainer` would log a second number of tokens a second

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Return 0: `SpeedMeter` counts them, and by more than the number of parameters."""
        return 0

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the objective's metrics, each name with `eval_` before it, and log them."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        start = time.time()
        self.stop_on_signal.interrupt_evaluation(self.args.device)
        with self._final_weights(), self.status.during(EVALUATING):
            with separate_random_state(self.args.seed + self.state.global_step):
                values = self.objective.evaluate(self, dataset)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
            metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.note_evaluation(metrics)
        return metrics

    def save_whole_model(self, folder: Path, write_more: Callable[[Path], object] | None = None) -> None:
        """As usual, with the averaged weights where there is an average."""
        with self._final_weights():
            super().save_whole_model(folder, write_more)

    def _final_weights(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that `final` would have."""
        return nullcontext() if self.average is None else self.average.in_place()
