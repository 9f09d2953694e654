"""What does not go together with `trainer.packing`."""

from collections.abc import Iterator

from vlm.config.schema import RunConfig


def packing_problems(config: RunConfig) -> Iterator[str]:
    """Yield why a run cannot pack its batches as it says; each with the key and what to do."""
    trainer = config.trainer
    most = trainer.max_tokens_per_batch
    if not trainer.packing:
        if most is not None:
            yield f"trainer.max_tokens_per_batch={most}: only trainer.packing=true fills batches by tokens"
        return
    if trainer.train_sampling_strategy == "sequential":
        yield (
            "trainer.packing=true and trainer.train_sampling_strategy=sequential: packing settles which samples stand "
            "together, and in which order; leave one of them out"
        )
    longest = config.dataset.max_length
    if config.dataset.streaming and most is not None and longest is not None and most < longest:
        yield (
            f"trainer.max_tokens_per_batch={most}: the lengths of a stream are not known before; at least "
            f"dataset.max_length={longest} is needed"
        )
