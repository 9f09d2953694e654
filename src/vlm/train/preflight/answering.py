"""The time of what a run does at its evaluations beside computing losses: it answers samples, and draws plots."""

import time
from pathlib import Path

from vlm.config.choices import LOSS_METRICS
from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.train.data import first_samples
from vlm.train.monitor.peak_flops import synchronize
from vlm.train.monitor.plots import draw_loss, draw_speed
from vlm.train.objectives.base import PreparedRun
from vlm.train.sample_generation import generate_answers, open_prompts
from vlm.train.trainer import VLMTrainer

NUM_ANSWERED = 4
"""Samples that a probe answers in one batch, where the run's number is another or none."""
ANSWERING_SECONDS = 5.0
"""A probe's answers are cut off behind that time; what is left of them is then taken to be as slow."""
EXAMPLE = [
    {"step": step, "loss": 1.0, "eval_loss": 1.0, "tokens_per_second": 1.0, "data_wait_share": 0.1} for step in (1, 2)
]
"""Logs to draw."""


def time_answer(run: PreparedRun, trainer: VLMTrainer, config: RunConfig) -> float:
    """Return the seconds that a model takes, as it is now, for each of the answers of a batch; 0: it gives none.

    Args:
        run: its evaluation records are answered, or its training records where it has no others.
        trainer: of the model that answers.
        config: of the run.
    """
    asks = config.trainer.num_samples or measures_answers(config)
    if not asks or not trainer.model.can_generate():
        return 0.0
    records = run.data.records.get("eval", run.data.records["train"])
    prompts = open_prompts(run.processor, first_samples(records, config.trainer.num_samples or NUM_ANSWERED))
    if not prompts:
        return 0.0
    settings, begun = config.inference, time.perf_counter()
    ids = generate_answers(trainer, run.processor, prompts, settings, max_time=ANSWERING_SECONDS)
    synchronize(trainer.args.device)
    seconds, written = time.perf_counter() - begun, max(map(len, ids))
    if seconds >= ANSWERING_SECONDS and written:
        seconds *= max(settings.max_new_tokens / written, 1.0)
    return seconds / len(prompts)


def measures_answers(config: RunConfig) -> bool:
    """Return whether a run computes metrics of its model's answers."""
    return any(name not in LOSS_METRICS for name in config.trainer.eval_metrics)


def num_answers(config: RunConfig, evaluation: object, evaluations: int, *, ends_with_one: bool) -> int:
    """Return how many samples a run answers: for people to look at, and for metrics.

    Args:
        config: of the run.
        evaluation: its evaluation records, if it has some.
        evaluations: number of its evaluations.
        ends_with_one: whether one comes behind the last step; else samples are answered there too.
    """
    trainer = config.trainer
    shown = trainer.num_samples * (evaluations + (not ends_with_one))
    if not measures_answers(config) or not isinstance(evaluation, SampleDataset):
        return shown
    return shown + evaluations * min(trainer.eval_metrics_samples, len(evaluation))


def time_drawing(folder: Path) -> float:
    """Return the seconds that the plots of a run take to be drawn once the library is loaded."""
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        draw_loss(EXAMPLE, folder / "loss.png")
        draw_speed(EXAMPLE, folder / "speed.png")
        seconds = time.perf_counter() - begun
    return seconds
