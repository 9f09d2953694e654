"""Random numbers of training: evaluations, sample answers and loaders take none of them.

What a step draws then depends on the steps before it alone. A run that is resumed draws as the one that was not
stopped, wherever it evaluated, and evaluating more often changes no weight.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import enable_full_determinism


def seed_everything(args: TrainingArguments) -> None:
    """Seed all generators of random numbers; with `trainer.full_determinism`, choose deterministic kernels too."""
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)


@contextmanager
def separate_random_state(seed: int) -> Iterator[None]:
    """Draw from `seed` within, and leave the generators of Python, NumPy, the CPU and this process's GPU as they were.

    What is drawn within then depends on the seed alone, not on when a run was resumed.
    """
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def with_own_generator(loader: DataLoader, seed: int) -> DataLoader:
    """Return a loader that draws the seeds of its workers from a generator of its own."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper iterates over this one
    inner.generator = torch.Generator().manual_seed(seed)
    return loader
