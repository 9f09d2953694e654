"""What does not go together with `trainer.packing`."""

from collections.abc import Iterator

from vlm.config.choices import BEST_FIT
from vlm.config.schema import RunConfig


def packing_problems(config: RunConfig, *, takes_loss_weights: bool = True) -> Iterator[str]:
    """Yield why a run cannot pack its batches as requested, each with the key and what to do.

    `takes_loss_weights` is the objective's, see `vlm.train.objectives.base.Objective`.
    """
    trainer = config.trainer
    most, strategy = trainer.max_tokens_per_batch, trainer.packing_strategy
    yield from _auto_batch_problems(config)
    if not trainer.packing:
        if most is not None:
            yield f"trainer.max_tokens_per_batch={most}: it needs trainer.packing=true"
        if strategy == BEST_FIT:
            yield f"trainer.packing_strategy={strategy}: without trainer.packing=true it has no effect; leave it out"
        return
    if strategy == BEST_FIT:
        yield from _best_fit_problems(config)
    elif trainer.loss_average == "micro_batch" and not takes_loss_weights:
        yield (
            f"trainer.loss_average=micro_batch: trainer.objective={trainer.objective} does not weight the losses of "
            "packed rows, which several micro-batches share (Objective.takes_loss_weights). Choose token, or "
            "trainer.packing=false"
        )
    longest = config.dataset.max_length
    if config.dataset.streaming and most is not None and longest is not None and most < longest:
        yield (
            f"trainer.max_tokens_per_batch={most}: the lengths of a stream are not known in advance; at least "
            f"dataset.max_length={longest} is needed"
        )


def _auto_batch_problems(config: RunConfig) -> Iterator[str]:
    """Yield why the maximum tokens of a row cannot be found, or settings of `auto_batch` without effect."""
    trainer = config.trainer
    if not trainer.auto_batch:
        if (limit := trainer.auto_batch_memory_gb) is not None:
            yield f"trainer.auto_batch_memory_gb={limit:g}: it has no effect without trainer.auto_batch=true"
    elif not trainer.packing or trainer.packing_strategy == BEST_FIT:
        yield (
            "trainer.auto_batch=true: it chooses the length of packed rows; it needs "
            "trainer.packing=true and trainer.packing_strategy=step, which keep the samples of a step"
        )
    elif trainer.max_tokens_per_batch is not None:
        yield f"trainer.auto_batch=true and trainer.max_tokens_per_batch={trainer.max_tokens_per_batch}: choose one"


def _best_fit_problems(config: RunConfig) -> Iterator[str]:
    """Yield settings of order and of the last batch, which have no effect if rows are filled from all samples."""
    trainer = config.trainer
    if trainer.train_sampling_strategy != "random":
        yield (
            f"trainer.packing_strategy={BEST_FIT} and trainer.train_sampling_strategy="
            f"{trainer.train_sampling_strategy}: {BEST_FIT} chooses the samples of a row and the order of rows; "
            "choose random, or trainer.packing_strategy=step"
        )
    if trainer.dataloader_drop_last:
        yield "trainer.dataloader_drop_last=true: packs split evenly, so there is no last batch to drop; leave it out"
