"""`python -m vlm`, `vlm -cn RUN`, `deepspeed --module vlm` and `torchrun -m vlm`: train what a configuration says.

Refuses what it can before importing torch; then hands a plain `RunConfig` to `vlm.train.run`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vlm.checks.compose import with_config
from vlm.checks.lora import QUANTIZABLE_PARTS
from vlm.cli.collection import collect_as_usual, no_collection
from vlm.config.schema import RunConfig
from vlm.train.objectives.table import make_objective

BITSANDBYTES_OPTIMIZERS = re.compile("8bit|bnb|paged|lion|ademamix")
DYNAMO_SWITCH = "TORCHDYNAMO_DISABLE"
"""The environment variable that turns torch's compiler off."""


def main(words: Sequence[str] | None = None) -> None:
    """Compose the configuration that the command line asks for, check it, and run it."""
    with_config(words, train, make_objective)


def train(config: RunConfig, name: str, overrides: list[str]) -> None:
    """Train on this rank, together with every other rank."""
    with uncompiled_bitsandbytes(config), no_collection():
        from vlm.train.run import run  # torch comes with it

    collect_as_usual()
    run(config, name, overrides)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # a rank that exits while another one works may make that one abort
        dist.destroy_process_group()


@contextmanager
def uncompiled_bitsandbytes(config: RunConfig) -> Iterator[None]:
    """Import without torch's compiler, where a run needs nothing of bitsandbytes.

    transformers' `Trainer` imports peft, which imports bitsandbytes, which decorates four kernels for the CPU with
    `torch.compile`, and that imports the compiler: two seconds for kernels that such a run never calls.
    """
    optimizer = config.trainer.optim or ""
    quantized = any(getattr(config.model, part).quantization for part in QUANTIZABLE_PARTS)
    if quantized or BITSANDBYTES_OPTIMIZERS.search(optimizer) or DYNAMO_SWITCH in os.environ:
        yield
        return
    os.environ[DYNAMO_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[DYNAMO_SWITCH]
