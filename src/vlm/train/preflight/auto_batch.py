"""`trainer.auto_batch`: the most tokens of a packed row that fit into a device's memory, by prediction.

Rows alone change: the samples of a step, its loss and its gradient stay those of the configuration.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedConfig, TrainingArguments

from vlm.config.schema import TrainerOptions
from vlm.data.blank_images import dummy_image
from vlm.data.processor import Processor
from vlm.train.checkpoints.find import list_checkpoints
from vlm.train.data import max_sample_length
from vlm.train.distributed import all_gather_objects
from vlm.train.model import compute_dtype
from vlm.train.objectives.base import Objective
from vlm.train.preflight.available import available_bytes, ranks_here
from vlm.train.preflight.fake_step import BatchShape, MemoryNotCountable
from vlm.train.preflight.libraries import libraries_restored
from vlm.train.preflight.memory import ModelSizes, predict_memory
from vlm.train.preflight.paper import prepare_on_paper
from vlm.train.preflight.sharded import predict_sharded, sharding_of
from vlm.train.resume.start import ANEW_WORDS, AUTO_WORDS
from vlm.train.run_directory import CONFIG_FILE

log = logging.getLogger(__name__)

USABLE = 0.9
"""Share of a device's memory that a step may take, where `trainer.auto_batch_memory_gb` says nothing."""
MULTIPLE = 64
"""The number of tokens is a multiple of this."""


def set_auto_batch(
    objective: Objective, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments, folder: Path
) -> None:
    """Set `trainer.max_tokens_per_batch` of a run: as it was recorded where the run goes on, else what fits.

    Every rank calls it, and all have the same value. It is written into `config.yaml`.

    Raises:
        ValueError: the memory of a step of this model cannot be predicted.
    """
    trainer = objective.config.trainer
    recorded = read_recorded(trainer.resume_from_checkpoint, folder)
    if recorded is None:
        try:
            own = choose_max_tokens(objective, model_config, processor, args)
        except MemoryNotCountable as reason:
            raise ValueError(
                f"trainer.auto_batch=true: the memory of a step is not predicted ({reason}); give "
                "trainer.max_tokens_per_batch"
            ) from reason
        recorded = min(all_gather_objects(own))
    trainer.max_tokens_per_batch = recorded
    log.info("trainer.auto_batch: rows have up to %s tokens (trainer.max_tokens_per_batch)", f"{recorded:,}")


def read_recorded(requested: str, folder: Path) -> int | None:
    """Return what a run that goes on has recorded; None: it begins.

    `requested` is `trainer.resume_from_checkpoint`: a word, or the checkpoint of another directory.
    """
    word = requested.lower()
    directory = folder if word in AUTO_WORDS else Path(requested).parent
    file = directory / CONFIG_FILE
    if word in ANEW_WORDS or not list_checkpoints(directory) or not file.is_file():
        return None
    trainer = yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]
    return trainer["max_tokens_per_batch"] if trainer.get("auto_batch") else None


def choose_max_tokens(
    objective: Objective, model_config: PreTrainedConfig, processor: Processor, args: TrainingArguments
) -> int:
    """Return the most tokens of a row whose step fits: at least the longest sample, at most all samples of a step.

    Raises:
        MemoryNotCountable: the model does not run without data.
    """
    config = objective.config
    with libraries_restored():
        model, paper, own, _ = prepare_on_paper(objective, model_config, processor)
    ids, image = dummy_image(processor)
    sizes, dtype = ModelSizes.of(model), compute_dtype(args)
    way, ranks = sharding_of(config.trainer), max(args.world_size, 1)
    longest = max_sample_length(config.dataset, model_config)

    def needed(tokens: int) -> int:
        """Return the bytes of a device for a step with rows of so many tokens."""
        lengths = (longest,) * (tokens // longest) + ((tokens % longest,) if tokens % longest else ())
        shape = BatchShape(1, tokens, max(tokens // max(len(ids), 1), 1), tokens // 2, lengths)
        found = predict_memory(objective, model, paper, own, image, [shape] * 2, dtype)
        limited = replace(config.trainer, max_tokens_per_batch=tokens)
        return predict_sharded(found, sizes, ranks, half=dtype != torch.float32, own=limited)[way].device

    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return search(needed, _limit(config.trainer, args.device, ranks), longest, samples * longest)


def search(needed: Callable[[int], int], limit: int, least: int, most: int) -> int:
    """Return the largest number of tokens whose bytes are within a limit: a multiple of 64, `least` or `most`.

    Args:
        needed: bytes for a number of tokens; grows with it.
        limit: the most bytes.
        least: returned where not even this fits.
        most: never exceeded.
    """
    if needed(least) > limit:
        log.warning("trainer.auto_batch: even a row of one sample of %s tokens may not fit", f"{least:,}")
        return least
    if needed(most) <= limit:
        return most
    low, high = least // MULTIPLE, -(-most // MULTIPLE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle * MULTIPLE) <= limit else (low, middle)
    return max(low * MULTIPLE, least)


def _limit(trainer: TrainerOptions, device: torch.device, ranks: int) -> int:
    gigabytes = trainer.auto_batch_memory_gb
    return int(USABLE * available_bytes(device, ranks_here(ranks))) if gigabytes is None else int(gigabytes * 1e9)
