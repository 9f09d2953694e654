"""What a run's keys say of how a step is computed (checkpointing, compilation) that cannot be meant."""

from collections.abc import Iterator
from typing import Any

from vlm.config.schema import PARTS, RunConfig


def step_problems(config: RunConfig) -> Iterator[str]:
    """Each with the key, the value and what to do."""
    trainer: Any = config.trainer  # the keys that are passed through are fields made at import
    named = trainer.checkpointed_parts
    if named is not None:
        allowed = ", ".join(PARTS)
        if not named:
            yield f"trainer.checkpointed_parts=[]: name at least one of {allowed}, or leave it null"
        for name in named:
            if name not in PARTS:
                yield f"trainer.checkpointed_parts={named}: there is no part {name}; allowed are {allowed}"
        if not trainer.activation_checkpointing:
            yield (
                f"trainer.checkpointed_parts={named}: nothing is checkpointed without "
                "trainer.activation_checkpointing=true"
            )
