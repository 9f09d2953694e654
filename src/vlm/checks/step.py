"""Checks the keys of how a step is computed: activation checkpointing, the optimiser."""

from collections.abc import Iterator

from vlm.config.choices import MUON
from vlm.config.derived import get_value, shards_weights, training_keys
from vlm.config.schema import PARTS, RunConfig


def step_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with `trainer.checkpointed_parts`: the key, its value and what to do."""
    key, parts = "trainer.checkpointed_parts", config.trainer.checkpointed_parts
    if parts == []:
        yield f"{key}=[]: name at least one of {', '.join(PARTS)}, or leave it null"
    if parts is not None and not config.trainer.activation_checkpointing:
        yield f"{key}={parts}: nothing is checkpointed without trainer.activation_checkpointing=true"


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """Yield settings that do not work with the optimiser, with layer decay, or with averages of weights.

    Muon orthogonalises whole matrices, which DeepSpeed flattens.
    """
    if config.trainer.optim == MUON and config.trainer.deepspeed:
        yield (
            "trainer.optim=muon and trainer.deepspeed: Muon needs whole matrices, which DeepSpeed flattens; leave "
            "trainer.deepspeed out (torchrun trains on several GPUs without it), or choose another optimiser"
        )
    yield from _layer_decay_problems(config)
    if (decay := config.trainer.average_decay) is not None and shards_weights(config.trainer):
        yield (
            f"trainer.average_decay={decay:g}: under ZeRO-3 and FSDP2, no rank has the whole weights to average; "
            "leave it out, or choose trainer/deepspeed=zero2"
        )


def _layer_decay_problems(config: RunConfig) -> Iterator[str]:
    training = training_keys(config.trainer)
    for part in ("visual_encoder", "language_model"):
        decay = get_value(config, key := f"trainer.learning_rate.{part}_layer_decay")
        if decay is not None and part not in training:
            yield f"{key}={decay:g}: the {part} does not train; leave it out, or unfreeze the part (trainer.unfreeze)"
