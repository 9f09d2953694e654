"""Batches of evaluation records in the order of the data set, none left out; each evaluation has its own loader."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from vlm.data.batching.collator import SAMPLE_REFS, SKIPPED_KEY
from vlm.data.batching.stats import BATCH_STATS
from vlm.data.progress import show_progress
from vlm.train.arguments import loader_options
from vlm.train.objectives.base import Collate, Inputs
from vlm.train.signals import ignore_signals_in_workers
from vlm.train.stop_on_signal import StopOnSignal


class EvaluatingTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    args: TrainingArguments
    accelerator: Any  # accelerate declares what it prepares as a union of everything
    data_collator: Any
    stop_on_signal: StopOnSignal

    def _prepare_inputs(self, inputs: Inputs) -> Inputs: ...


def iterate_batches(
    trainer: EvaluatingTrainer, dataset: Dataset[object], title: str, collate: Collate | None
) -> Iterator[Inputs]:
    """Yield this rank's batches on the device, with a progress bar; see `ObjectiveTrainer.evaluation_batches`.

    Workers end with the evaluation: accelerate keeps loaders, and persistent ones would stay for the rest of the run.

    Raises:
        ValueError: a record cannot be used.
    """
    args, accelerator = trainer.args, trainer.accelerator
    size = args.eval_batch_size
    if collate is not None:
        size = accelerator.num_processes if accelerator.split_batches else 1  # one item for each rank
    options = loader_options(args)
    options["persistent_workers"] = False
    loader = accelerator.prepare(DataLoader(dataset, size, collate_fn=collate or trainer.data_collator, **options))
    silent = args.disable_tqdm or not args.should_save
    for batch in show_progress(ignore_signals_in_workers(loader), title, unit="batch", silent=silent):
        trainer.stop_on_signal.interrupt_evaluation(args.device)
        for name in (BATCH_STATS, SAMPLE_REFS):
            batch.pop(name, None)
        for record in batch.pop(SKIPPED_KEY, []):
            raise record.as_error()
        if collate is None:
            yield trainer._prepare_inputs(batch)
        else:
            yield {name: trainer._prepare_inputs(part) for name, part in batch.items()}
