"""The world of a run: its number of ranks, its sharding, and its samples per step.

A checkpoint has the world that wrote it in `world.json`. `find_world_problem` says which other worlds can resume from
it in the same order of data. Imports no torch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from vlm.config.choices import BEST_FIT
from vlm.config.derived import zero_stage
from vlm.config.schema import RunConfig

WORLD_FILE = "world.json"
UNSHARDED = "none"


@dataclass(frozen=True)
class World:
    """The settings of a run that depend on the number of ranks and on sharding.

    Attributes:
        ranks: number of ranks.
        sharding: `none`, `fsdp2`, or `zero0` to `zero3`.
        batch_size: `trainer.per_device_train_batch_size`.
        accumulation: `trainer.gradient_accumulation_steps`.
        loss_average: `token`, or `micro_batch`, for which the samples of a micro-batch matter.
        precision: `float32`, `bf16` or `fp16`.
        streams: whether records are read from a stream, of which each rank reads its own share.
        packs_best_fit: whether rows are packed in an order that depends on the number of ranks.
    """

    ranks: int
    sharding: str
    batch_size: int
    accumulation: int
    loss_average: str
    precision: str = "float32"
    streams: bool = False
    packs_best_fit: bool = False

    @classmethod
    def of(cls, config: RunConfig, ranks: int, loss_average: str) -> Self:
        """Return the world of a run on this many ranks; `loss_average` is that of its objective."""
        trainer = config.trainer
        sharding = trainer.sharding or (f"zero{zero_stage(trainer.deepspeed)}" if trainer.deepspeed else UNSHARDED)
        return cls(
            ranks=ranks,
            sharding=sharding,
            batch_size=trainer.per_device_train_batch_size,
            accumulation=trainer.gradient_accumulation_steps,
            loss_average=loss_average,
            precision="bf16" if trainer.bf16 else "fp16" if trainer.fp16 else "float32",
            streams=config.dataset.streaming,
            packs_best_fit=trainer.packing and trainer.packing_strategy == BEST_FIT,
        )

    @property
    def samples(self) -> int:
        """The number of samples of an optimiser step, on all ranks."""
        return self.ranks * self.batch_size * self.accumulation

    @property
    def layout(self) -> tuple[str, int]:
        """The layout of a checkpoint's files; those of another layout are read parameter by parameter."""
        depends_on_ranks = self.sharding in ("zero1", "zero2", "zero3") or self.is_half_zero0
        return self.sharding, self.ranks if depends_on_ranks else 0

    @property
    def is_half_zero0(self) -> bool:
        """Whether DeepSpeed keeps float32 copies of weights without ZeRO, which has a layout of its own."""
        return self.sharding == "zero0" and self.precision != "float32"

    def write(self, checkpoint: Path) -> None:
        """Write `world.json` into a checkpoint; one rank does."""
        (checkpoint / WORLD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_world(checkpoint: Path) -> World | None:
    """Return the world that wrote a checkpoint; None if it does not say, as those of earlier versions."""
    file = checkpoint / WORLD_FILE
    return World(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def find_world_problem(checkpoint: Path, present: World, *, accepts_other_steps: bool = False) -> str | None:
    """Return why a run cannot resume from a checkpoint that another world wrote; None: it can, or nothing is known.

    With the same ranks, sharding and layout, the batch is not compared here. With `accepts_other_steps`, steps and
    micro-batches may have another number of samples.
    """
    saved = read_world(checkpoint)
    is_same = saved is not None and (saved.ranks, saved.sharding) == (present.ranks, present.sharding)
    if saved is None or (is_same and saved.layout == present.layout):
        return None
    wrote = f"{checkpoint}: {saved.ranks} rank(s) wrote it (sharding: {saved.sharding}), this run has {present.ranks}"
    wrote += f" (sharding: {present.sharding})"
    if saved.layout != present.layout:
        if "fp16" in (saved.precision, present.precision):
            return f"{wrote}; the loss scale of fp16 cannot be carried over. Resume with the same ranks and sharding"
        if saved.is_half_zero0 or present.is_half_zero0:
            return f"{wrote}; zero0 in half precision cannot be converted. Keep the ranks and sharding, or use zero1"
    if saved.samples != present.samples and not accepts_other_steps:
        return f"{wrote}; {_batch_advice(saved, present)}"
    differs = saved.loss_average == "micro_batch" and saved.batch_size != present.batch_size
    if differs and not accepts_other_steps:
        return (
            f"{wrote}; its losses are means of micro-batches (trainer.loss_average=micro_batch) of {saved.batch_size} "
            f"samples. Set trainer.per_device_train_batch_size={saved.batch_size}"
        )
    if saved.ranks != present.ranks and (saved.streams or present.streams):
        return f"{wrote}; each rank reads a share of a stream (dataset.streaming=true). Resume on {saved.ranks} rank(s)"
    if saved.ranks != present.ranks and (saved.packs_best_fit or present.packs_best_fit):
        return (
            f"{wrote}; trainer.packing_strategy=best_fit fills rows for a given number of ranks. Resume on "
            f"{saved.ranks} rank(s); packing_strategy=step has no such limit"
        )
    return None


def _batch_advice(saved: World, present: World) -> str:
    """Return the settings with which a step has as many samples as before."""
    had = f"a step had {saved.samples} samples and would now have {present.samples}"
    if saved.samples % (present.ranks * present.batch_size) == 0:
        needed = saved.samples // (present.ranks * present.batch_size)
        return f"{had}. Set trainer.gradient_accumulation_steps={needed}"
    if saved.samples % present.ranks == 0:
        share = saved.samples // present.ranks
        return (
            f"{had}. Set trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps so that their "
            f"product is {share}"
        )
    return f"{had}. Choose a number of ranks that divides {saved.samples}"
