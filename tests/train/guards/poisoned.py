"""`python -m vlm` whose loss is multiplied on rank 1 at one step: `--poison=STEP,FACTOR` before the other words."""

import sys
from typing import Any

import torch

from vlm.cli.train import main
from vlm.train.objectives.generation import Generation

compute = Generation.compute_loss


def poison(step: int, factor: float) -> None:
    """Multiply the loss of a step, from 1."""

    def compute_loss(self: Generation, trainer: Any, *args: Any) -> tuple[torch.Tensor, Any]:
        loss, outputs = compute(self, trainer, *args)
        is_poisoned = trainer.state.global_step + 1 == step and trainer.args.process_index == 1
        return loss * factor if is_poisoned else loss, outputs

    Generation.compute_loss = compute_loss


if __name__ == "__main__":
    chosen = next(word for word in sys.argv if word.startswith("--poison="))
    number, factor = chosen.removeprefix("--poison=").split(",")
    poison(int(number), float(factor))
    main([word for word in sys.argv[1:] if word != chosen])
