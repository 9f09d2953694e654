"""`python -m vlm` whose loss is NaN on rank 1 at the second step."""

import sys
from typing import Any

import torch

from vlm.cli.train import main
from vlm.train.objectives.generation import Generation

compute = Generation.compute_loss


def compute_loss(self: Generation, trainer: Any, *args: Any) -> tuple[torch.Tensor, Any]:
    """Compute the loss, poisoned."""
    loss, outputs = compute(self, trainer, *args)
    is_poisoned = trainer.state.global_step == 1 and trainer.args.process_index == 1
    return loss * torch.nan if is_poisoned else loss, outputs


if __name__ == "__main__":
    Generation.compute_loss = compute_loss
    main(sys.argv[1:])
