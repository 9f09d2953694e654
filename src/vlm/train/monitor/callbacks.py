"""Callbacks of every run: metrics, plots, sample answers, and the sampler's epoch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm.runs.files import Folder
from vlm.runs.samples import STEP_HEADING
from vlm.train.checkpoints.files import write_text_whole
from vlm.train.distributed import broadcast_from_rank0
from vlm.train.monitor.plots import Metrics, draw_loss, draw_speed
from vlm.train.random_state import separate_random_state


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`; redraws `loss.png` and `speed.png` when a run evaluates, saves or ends.

    `loss_label` says in the plot what the loss is.
    """

    def __init__(self, folder: Path, loss_label: str = "loss"):
        self.folder, self.path, self.loss_label = folder, folder / "metrics.jsonl", loss_label

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Remove the logs after the checkpoint that a run resumes from; a new run starts with an empty file."""
        if state.is_world_process_zero:
            step = state.global_step
            lines = [line for line in read_metrics(self.path) if line["step"] <= step and step]
            write_text_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **kwargs: object
    ):
        """Append a line: the step, the epoch and what was logged, null instead of NaN and infinity."""
        if state.is_world_process_zero and logs:
            values = {key: value if math.isfinite(value) else None for key, value in logs.items()}  # JSON has no NaN
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'step': state.global_step, **values})}\n")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Redraw the plots."""
        if state.is_world_process_zero and self.path.exists():
            metrics = read_metrics(self.path)
            draw_loss(metrics, self.folder / "loss.png", self.loss_label)
            if any("samples_per_second" in line for line in metrics):
                draw_speed(metrics, self.folder / "speed.png")

    on_save = on_train_end = on_evaluate


def read_metrics(path: Path) -> list[Metrics]:
    """Return the lines of a `metrics.jsonl`; none if there is no such file.

    Incomplete lines are left out: a run may be killed, or find the disk full, in the middle of a line.
    """
    return [cast(Metrics, line) for line in Folder(path.parent).json_lines(path.name) if "step" in line]


class SampleGenerationCallback(TrainerCallback):
    """Lets the model answer some samples at each evaluation and at the end; every rank takes part.

    `generate` adds the answers at a step to `file`, `samples.md`.
    """

    def __init__(self, generate: Callable[[int], None], file: Path):
        self.generate, self.file = generate, file
        self.last_generated_step = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Find out at which step a resumed run last wrote answers; rank 0 knows."""
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        steps = [int(step) for step in STEP_HEADING.findall(text)]
        self.last_generated_step = broadcast_from_rank0(steps[-1] if steps and state.global_step else -1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Answer, at most once a step: the end of a run often follows an evaluation."""
        if state.global_step != self.last_generated_step:
            with separate_random_state(args.seed + state.global_step):
                self.generate(state.global_step)
            self.last_generated_step = state.global_step

    on_train_end = on_evaluate


class SetSamplerEpoch(TrainerCallback):
    """Tells a sampler the epoch, even if the wrappers of a resumed loader do not pass it on."""

    def __init__(self, get_sampler: Callable[[], Any]):
        self.get_sampler = get_sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Set the epoch: the integer part of `state.epoch`."""
        if self.get_sampler() is not None:
            self.get_sampler().set_epoch(int(state.epoch or 0))
