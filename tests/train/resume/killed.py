"""`python -m vlm`, killed as `kill -9` does at a point that the environment names: `KILL=step:3`, `KILL=save:2@1`.

`step:N` is in the step after the N-th, `save:N` in the save of checkpoint N when its weights are written, `final` when
`final` is written and not yet in its place. `@R` is the rank that dies; without it every rank does.
"""

import os
import signal
from typing import Any

from vlm.cli.main import main
from vlm.train import run
from vlm.train.trainer import VLMTrainer


def arrange(point: str, number: int) -> None:
    """Let this process be killed at a point."""
    step, save, write = VLMTrainer.training_step, VLMTrainer._save_rng_state, run.write_final

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self: VLMTrainer, *args: Any, **kwargs: Any) -> Any:
        return kill() if self.state.global_step == number else step(self, *args, **kwargs)

    def save_rng_state(self: VLMTrainer, output_dir: str) -> None:
        return kill() if self.state.global_step == number else save(self, output_dir)

    VLMTrainer.training_step = training_step if point == "step" else step
    VLMTrainer._save_rng_state = save_rng_state if point == "save" else save
    run.write_final = kill if point == "final" else write


if __name__ == "__main__":
    place, _, rank = os.environ.get("KILL", "").partition("@")
    if place and rank in ("", os.environ.get("RANK", "0")):
        name, _, count = place.partition(":")
        arrange(name, int(count or -1))
    main()
