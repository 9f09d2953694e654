"""`python -m vlm`, `vlm -cn RUN`, `deepspeed --module vlm` and `torchrun -m vlm`: train what a configuration says.

Refuses what it can before importing torch; then hands a plain `RunConfig` to `vlm.train.run`.
"""

from collections.abc import Sequence

from vlm.checks.compose import with_config
from vlm.config.schema import RunConfig
from vlm.train.objectives.table import make_objective


def main(words: Sequence[str] | None = None) -> None:
    """Compose the configuration that the command line asks for, check it, and run it."""
    with_config(words, train, make_objective)


def train(config: RunConfig, name: str, overrides: list[str]) -> None:
    """Train on this rank, together with every other rank."""
    from vlm.train.run import run  # torch comes with it

    run(config, name, overrides)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # a rank that exits while another one works may make that one abort
        dist.destroy_process_group()
