"""A thin subclass of transformers' `Trainer`: parts as optimiser groups, two loss averages, and small checkpoints.

What it adds, and nothing else: one optimiser group for each part and decay class; LLaVA's mean of micro-batch means
beside the mean over tokens; grouping by modality and length; evaluation exact to the token, with the loss on blank
pictures; checkpoints that hold what trains.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, speed_metrics

from vlm.assembly.adapter_base import Base
from vlm.assembly.adapter_folder import save as save_on_base
from vlm.config.schema import RunConfig
from vlm.data.batching.collator import SKIPPED_KEY
from vlm.data.batching.packing import PackSampler
from vlm.data.batching.samplers import GROUP_BY_MODALITY_LENGTH, GroupSampler, ModalityLengthSampler
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.dataset import Skipped
from vlm.data.stream import SampleStream
from vlm.families.table import get_part_names
from vlm.train.arguments import sampler_seed
from vlm.train.distributed import barrier
from vlm.train.objectives.base import Objective
from vlm.train.parts import Part, parameter_groups
from vlm.train.signals import SigtermCheckpoint, ignore_sigterm_in_workers
from vlm.train.step.compile import force_eager
from vlm.train.step.packed_attention import use_packed_attention
from vlm.train.step.packing import add_grid_positions, check_packing, make_packed_loader
from vlm.train.timed_trainer import TimedTrainer

TRAINED_WEIGHTS = "trained.safetensors"
COMPLETE_MARK = "complete"


class VLMTrainer(TimedTrainer):
    """Trains a model whose parts have learning rates of their own.

    Args:
        objective: what the run trains the model to do.
        processor: the model's, which normalises pixels and is saved with it.
        parts: the model's parts, see `train/parts.py`.
        base: what the result is written on top of (adapters, quantised parts); None: the result is whole.
        loss_average: `token` or `micro_batch`.
        sampling: `trainer.train_sampling_strategy`.
        packing: whether batches are packed rows.
        max_tokens: `trainer.max_tokens_per_batch`.
        on_first_batch: called with the first batch of this rank, before its forward pass.
        on_skipped: called with the records that a batch leaves out, and how many samples it has.
        kwargs: as `TimedTrainer`.
    """

    # `Trainer` declares these as unions; here each is what a run makes it.
    args: Any
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        *,
        objective: Objective,
        processor: Any,
        parts: list[Part],
        base: Base | None = None,
        loss_average: str,
        sampling: str,
        packing: bool = False,
        max_tokens: int | None = None,
        on_first_batch: Callable[[dict[str, Tensor]], None] | None = None,
        on_skipped: Callable[[list[Skipped], int], None],
        **kwargs: Any,
    ):
        super().__init__(processing_class=processor.tokenizer, **kwargs)
        self.objective = objective
        self.processor = processor
        self.parts = parts
        self.base = base
        self.loss_average = loss_average
        self.sampling = sampling
        self.packing, self.max_tokens = packing, max_tokens
        self.on_first_batch = on_first_batch
        self.on_skipped = on_skipped
        self.sampler: ModalityLengthSampler | GroupSampler | PackSampler | None = None

    # --- the run ------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; a run that fails listens to signals as the process did before it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for one in self.callback_handler.callbacks:
                if isinstance(one, SigtermCheckpoint):
                    one.restore()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """The run's precision; `Trainer` has it around calls of the whole model alone."""
        return self.accelerator.autocast()

    def _remove_autocast_wrapper(self) -> None:
        """Take off what accelerate put around the model's `forward`: it widens all logits to float32 at once."""
        forward = self.model.__dict__.pop("_original_forward", None)
        if forward is not None:
            self.model.forward = forward

    # --- optimisation -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The chosen optimiser over one group for each part and decay class."""
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & kwargs.keys():
                raise ValueError(
                    f"trainer.optim={self.args.optim}: it makes parameter groups of its own, which would lose each "
                    "part's learning rate. Choose another, such as adamw_torch_fused."
                )
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = kind(parameter_groups(self.parts, decayed), **kwargs)
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """None leaves the mean to each micro-batch; `Trainer` then averages over accumulation steps and ranks."""
        if self.loss_average == "micro_batch":
            return None
        number = super()._get_num_items_in_batch(batch_samples, device)
        return number.clamp(min=1) if isinstance(number, Tensor) else number  # a step whose records were all left out

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As usual; the first batch is shown to `on_first_batch`."""
        if self.on_first_batch is not None:
            self.on_first_batch(inputs)
            self.on_first_batch = None
        attending = use_packed_attention(self.model.config.get_text_config()) if self.packing else nullcontext()
        with attending:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Return the objective's loss of a batch."""
        loss, outputs = self.objective.compute_loss(self, model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the number is that of all ranks, which average gradients
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As usual, with each part's own learning rate beside the loss."""
        if "loss" in logs and self.lr_scheduler is not None:
            logs.pop("learning_rate", None)
            names = [group["name"].split(".")[0] for group in self.optimizer.param_groups]
            logs |= {f"learning_rate/{name}": rate for name, rate in zip(names, self._learning_rates(), strict=True)}
        super().log(logs, start_time)

    def _learning_rates(self) -> list[float]:
        return [float(rate) for rate in self.lr_scheduler.get_last_lr()]

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As usual; packs and streams are dealt to ranks, and records of a stream to workers, before."""
        streams = isinstance(self.train_dataset, SampleStream)
        if not (streams or self.packing):
            return super().get_train_dataloader()
        args, collate = self.args, cast(Any, self.data_collator)
        workers = args.dataloader_num_workers
        loader_options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "in_order": args.dataloader_in_order,
        }
        if self.packing:
            loader, self.sampler = make_packed_loader(
                self.train_dataset, collate, self.max_tokens, args, **loader_options
            )
        else:
            loader = DataLoader(self.train_dataset, self._train_batch_size, collate_fn=collate, **loader_options)
        return ignore_sigterm_in_workers(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As usual, but anew: `Trainer` would give persistent workers' records for their blank pictures too."""
        self._eval_dataloaders: dict[str, DataLoader] = {}
        loader = super().get_eval_dataloader(eval_dataset)
        self._eval_dataloaders = {}
        return loader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As usual; its workers outlive a signal to all of the run, which then saves a checkpoint."""
        return ignore_sigterm_in_workers(super()._get_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As usual; what a batch says of records left out is taken out of it and told."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            facts = batch.pop(BATCH_STATS, None)
            num_samples = len(batch[self.objective.row_key]) if facts is None else facts.samples
            self.on_skipped(batch.pop(SKIPPED_KEY, []), num_samples)
            if self.packing:
                batch |= add_grid_positions(self.model, batch)
            batch |= self.objective.extra_inputs(self, batch)
        return batches, number

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As usual, copied while the device computes; pixels are normalised there, if workers left that to it."""
        copied: Any = send_to_device(inputs, self.args.device, non_blocking=self.args.dataloader_pin_memory)
        inputs = super()._prepare_inputs(copied)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.processor.normalise(inputs["pixel_values"])
        return inputs

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.sampling != GROUP_BY_MODALITY_LENGTH:
            sampler: Any = self.objective.make_train_sampler(self, dataset)
            self.sampler = sampler
            return super()._get_train_sampler(dataset) if sampler is None else sampler
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = ModalityLengthSampler(dataset.lengths, dataset.num_images, step, sampler_seed(args))
        return self.sampler

    # --- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the objective's metrics, each name with `eval_` before it, and log them."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        start = time.time()
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in self.objective.evaluate(self, dataset).items()
        }
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_batches(self, dataset: Any, title: str) -> Iterator[dict[str, Any]]:
        """Yield the batches of a data set as the model takes them, with a progress bar; the model is set to evaluate.

        Raises:
            BadSample: a record cannot be used.
        """
        self.model.eval()
        silent = self.args.disable_tqdm or not self.args.should_save
        for batch in tqdm(self.get_eval_dataloader(dataset), title, leave=False, disable=silent):
            batch.pop(BATCH_STATS, None)
            for record in batch.pop(SKIPPED_KEY, []):
                raise record.as_error()
            yield self._prepare_inputs(batch)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model with its processor, complete or on top of its base; within a checkpoint, only what trains."""
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call and self.base is not None:
            new_rows = {name: min(part.new_tokens) for part in self.parts for name in part.rows}
            save_on_base(self.model, folder, self.base, new_rows=new_rows, is_writer=self.args.should_save)
            if self.args.should_save:
                self.processor.save_pretrained(folder)
        elif not _internal_call:
            state = self.accelerator.get_state_dict(self.model_wrapped)  # on every rank: ZeRO-3 gathers
            if self.args.should_save:
                self.model.save_pretrained(folder, state_dict=state)
                self.processor.save_pretrained(folder)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.is_deepspeed_enabled:  # DeepSpeed writes weights beside its optimiser states
                save_file(
                    {name: t.detach().contiguous() for name, t in self._trained_tensors().items()},
                    folder / TRAINED_WEIGHTS,
                )

    def _trained_tensors(self) -> dict[str, Tensor]:
        """What training changes: parameters with a gradient, and the buffers (batch statistics) of parts that train."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        saved = self.model.state_dict().keys()
        names = get_part_names(self.model.config)
        training = {part.name for part in self.parts if part.is_trainable}
        return named | {
            name: b for name, b in self.model.named_buffers() if name in saved and names.part_of(name) in training
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As usual; a mark in the folder says that every rank is done with it, and only then older ones go."""
        most, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = most
        barrier()
        if self.args.should_save:
            Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", COMPLETE_MARK).touch()
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=most)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put a checkpoint's trained weights over those that the run began with.

        Raises:
            ValueError: the checkpoint trained other parameters than this run does.
        """
        path = Path(resume_from_checkpoint, TRAINED_WEIGHTS)
        if not path.is_file():
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: no {TRAINED_WEIGHTS} in it; a checkpoint written "
                "under DeepSpeed is resumed with the same trainer.deepspeed."
            )
        state = load_file(path)
        trained = self._trained_tensors().keys()
        if different := sorted(trained ^ state.keys()):
            raise ValueError(
                f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it does not train what this run does, for "
                f"example {different[:3]}. Resume with the trainer.unfreeze and trainer.lora that it was made with."
            )
        self.model.load_state_dict(state, strict=False)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As usual; DeepSpeed checkpoints without the frozen parameters are read as such."""
        partial = resume_from_checkpoint is not None and self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if partial else resume_from_checkpoint
        )
        if partial:
            loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise ValueError(
                    f"trainer.resume_from_checkpoint={resume_from_checkpoint}: it was not written under DeepSpeed, and "
                    "this run trains with it. Resume with the trainer.deepspeed that it was made with."
                )
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._remove_autocast_wrapper()
        with self.compute_loss_context_manager(), force_eager():
            if self.packing:
                check_packing(self.model, self.processor)
            self.objective.on_train_begin(self)
        return prepared


def newest_checkpoint(run_directory: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    complete = [mark.parent for mark in run_directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_MARK}")]
    if not complete:
        raise ValueError(f"trainer.resume_from_checkpoint=true: no complete checkpoint in {run_directory}")
    return max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def checkpoint_to_resume(config: RunConfig, folder: Path) -> str | None:
    """What `trainer.resume_from_checkpoint` stands for."""
    requested = config.trainer.resume_from_checkpoint
    if requested is None or requested.lower() == "false":
        return None
    return str(newest_checkpoint(folder)) if requested.lower() == "true" else requested
