"""What is wrong with the keys of how a step is computed: checkpointing of activations, the optimiser."""

from collections.abc import Iterator

from vlm.config.choices import MUON
from vlm.config.schema import PARTS, RunConfig


def step_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with `trainer.checkpointed_parts`: the key, its value and what to do."""
    key, parts = "trainer.checkpointed_parts", config.trainer.checkpointed_parts
    if parts == []:
        yield f"{key}=[]: name at least one of {', '.join(PARTS)}, or leave it null"
    if parts is not None and not config.trainer.activation_checkpointing:
        yield f"{key}={parts}: nothing is checkpointed without trainer.activation_checkpointing=true"


def optimizer_problems(config: RunConfig) -> Iterator[str]:
    """Yield why Muon cannot train a run: it orthogonalises whole matrices, which DeepSpeed flattens."""
    if config.trainer.optim == MUON and config.trainer.deepspeed:
        yield (
            "trainer.optim=muon and trainer.deepspeed: Muon needs whole matrices, which DeepSpeed flattens; leave "
            "trainer.deepspeed out (torchrun trains on several GPUs without it), or choose another optimiser"
        )
