"""What does not go together with `trainer.packing`."""

from collections.abc import Iterator
from typing import Any

from vlm.config.schema import RunConfig


def packing_problems(config: RunConfig) -> Iterator[str]:
    """Why packing cannot be what is meant; each with the key and what to do."""
    trainer: Any = config.trainer  # the keys that are passed through are fields made at import
    most = trainer.max_tokens_per_batch
    if not trainer.packing:
        if most is not None:
            yield f"trainer.max_tokens_per_batch={most}: only trainer.packing=true fills batches by tokens"
        return
    if most is not None and most < 1:
        yield f"trainer.max_tokens_per_batch={most}: a number of at least 1 is needed, or null"
    if config.model.head.task is not None:
        yield "trainer.packing=true: prediction heads read one prompt a row; it is for runs that learn to write"
    if trainer.train_sampling_strategy == "sequential":
        yield (
            "trainer.packing=true and trainer.train_sampling_strategy=sequential: packing settles which samples stand "
            "together, and in which order; leave one of them out"
        )
    if trainer.dataloader_drop_last:
        yield "trainer.dataloader_drop_last=true: packs are dealt evenly, there is no last batch to drop; leave it out"
    if config.dataset.streaming:
        longest = config.dataset.max_length
        if most is not None and longest is not None and most < longest:
            yield (
                f"trainer.max_tokens_per_batch={most}: the lengths of a stream are not known before; at least "
                f"dataset.max_length={longest} is needed"
            )
