"""Tiny runs of many kinds, a way to kill one at any moment, and what has to be equal in the end."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures import head_words
from tests.forked import Ended, rank_environments, run_forked

KILL_AFTER = """
import os
import runpy
import signal

if seconds := float(os.environ.get("KILL_AFTER", "0")):
    signal.setitimer(signal.ITIMER_REAL, seconds)
runpy.run_module("vlm", run_name="__main__", alter_sys=True)
"""
"""Trains as `python -m vlm` does; after `KILL_AFTER` seconds the kernel ends the process, which has no say in it."""

KILL_AT_WRITE = """
import os
import runpy
import signal
import sys

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
last, count = int(os.environ.get("KILL_AT", "0")), 0


def count_writes(event, given):
    global count
    if not (event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITING)):
        return
    if not any(isinstance(path, (str, os.PathLike)) and "/checkpoint-" in str(path) for path in given):
        return
    count += 1
    if "COUNT_FILE" in os.environ:
        with open(os.environ["COUNT_FILE"], "w") as file:
            file.write(str(count))
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(count_writes)
runpy.run_module("vlm", run_name="__main__", alter_sys=True)
"""
"""Trains as `python -m vlm` does, and ends before it changes a file of a checkpoint for the time `KILL_AT`."""

KILLED = (-signal.SIGALRM, -signal.SIGKILL)
"""Exit statuses of processes that were ended by force."""

STEPS = ["trainer.num_train_epochs=3", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.warmup_steps=1"]


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        name: what it is called in reports.
        config: the configuration.
        words: overrides on top of those of every run.
        ranks: number of processes.
        is_head: whether it trains prediction heads.
    """

    name: str
    config: str = "pretrain-smol"
    words: Sequence[str] = ()
    ranks: int = 1
    is_head: bool = False

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"\W+", "-", self.name)

    def command(self, common: list[str], labelled: Path, folder: Path) -> list[str]:
        """Return the words behind `python -m vlm`."""
        head = head_words(labelled, "colour") if self.is_head else []
        return ["-cn", self.config, *common, *head, *STEPS, f"trainer.output_dir={folder}", *self.words]


LANGUAGE_MODEL = "trainer.learning_rate.language_model_learning_rate=1e-3"
ONE_RANK = (
    Kind("padded"),
    Kind("packed", words=["trainer.packing=true"]),
    Kind("packed, best_fit", words=["trainer.packing=true", "trainer.packing_strategy=best_fit"]),
    Kind("grouped", words=["trainer.train_sampling_strategy=group_by_modality_length"]),
    Kind("accumulated", words=["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=3"]),
    Kind("finetuned", "finetune-smol", [LANGUAGE_MODEL, "trainer.dataloader_num_workers=2"]),
    Kind(
        "LoRA",
        "finetune-smol",
        [LANGUAGE_MODEL, "trainer.unfreeze.train_language_model=false", "trainer.lora.language_model.r=2",
         "trainer.lora.dropout=0.1"],
    ),
    Kind("cached features", words=["dataset.cache_features=true"]),
    Kind(
        "evaluated and sampled",
        words=["dataset.eval_split=0.25", "trainer.eval_strategy=steps", "trainer.eval_steps=1"],
    ),
    Kind("saved in the background", words=["trainer.async_save=true", "trainer.save_steps=1"]),
    Kind("head", "head-classification", ["dataset.cache_features=false"], is_head=True),
    Kind("head, cached features", "head-classification", is_head=True),
    Kind(
        "stream",
        words=["dataset.streaming=true", "trainer.max_steps=9", "dataset.shuffle_buffer=5",
               "trainer.dataloader_num_workers=2"],
    ),
)  # fmt: skip
"""Kinds of runs of one process."""

TWO_RANKS = (
    Kind("ZeRO-2, packed", words=["trainer.deepspeed=zero2", "trainer.packing=true"], ranks=2),
    Kind("ZeRO-3, packed", "finetune-smol", [LANGUAGE_MODEL, "trainer.deepspeed=zero3", "trainer.packing=true"], 2),
    Kind("DDP", words=["trainer.train_sampling_strategy=group_by_modality_length"], ranks=2),
    Kind(
        "FSDP2, saved in the background",
        "finetune-smol",
        [LANGUAGE_MODEL, "trainer.sharding=fsdp2", "trainer.async_save=true", "trainer.save_steps=1"],
        ranks=2,
    ),
)
"""Kinds of runs of two processes."""

KINDS = {kind.name: kind for kind in (*ONE_RANK, *TWO_RANKS)}
"""Name -> kind."""


def train(words: list[str], ranks: int = 1, code: str = KILL_AFTER, rank: int = 0, **environment: str) -> list[Ended]:
    """Train with `code` in place of `python -m vlm`; with several ranks, `environment` is that of one of them."""
    environments = rank_environments(ranks) if ranks > 1 else [{}]
    environments[rank] |= environment
    return run_forked(*[["-c", code, *words]] * ranks, environments=environments, light=False)


def check_ended(ended: Sequence[Ended], *allowed: int) -> None:
    """Fail, with what the process wrote, where one ended with another status than 0 or one of those allowed."""
    for process in ended:
        assert process.returncode in (0, *allowed), process.stdout[-3000:] + process.stderr[-3000:]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's `final`."""
    weights = {
        f"{file.name}:{name}": weight
        for file in sorted((folder / "final").glob("*.safetensors"))
        for name, weight in load_file(file).items()
    }
    assert weights, f"{folder / 'final'} holds no weights"
    return weights


def different_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of weights that are not equal to the bit, or that only one of them has."""
    return sorted(one.keys() ^ other.keys()) + [
        name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])
    ]
