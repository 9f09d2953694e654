"""Checks where a run saves, and which checkpoints it keeps. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from vlm.checks.disk import write_problem
from vlm.checks.fields import format_value
from vlm.config.choices import PLATEAU_SCHEDULES
from vlm.config.schema import RunConfig

EVALUATION_PREFIX = "eval_"


def saving_problems(config: RunConfig, metric_names: frozenset[str] | None) -> Iterator[str]:
    """Yield a run directory that cannot be written to, and a best checkpoint by a metric that is not measured.

    `metric_names` are the names of the metrics of evaluations; None: they are not known in advance.
    """
    trainer = config.trainer
    folder = Path("outputs" if trainer.output_dir is None else trainer.output_dir)
    if problem := write_problem(folder):
        key = "" if trainer.output_dir is None else f"={trainer.output_dir}"
        yield f"trainer.output_dir{key}: {problem}. Choose a folder that this run can write to"
    if trainer.save_strategy == "best":
        yield "trainer.save_strategy=best: name a metric in trainer.keep_best, which saves at each new best evaluation"
    if trainer.metric_for_best_model is not None and trainer.lr_scheduler_type not in PLATEAU_SCHEDULES:
        yield f"trainer.metric_for_best_model={trainer.metric_for_best_model}: it is called trainer.keep_best here"
    if trainer.async_save and trainer.deepspeed:
        yield (
            "trainer.async_save=true and trainer.deepspeed: DeepSpeed writes its files while the run waits; leave one "
            "of them out, or choose trainer/deepspeed=none with trainer/sharding=fsdp2"
        )
    metric = trainer.keep_best
    if metric is None:
        if (greater := trainer.greater_is_better) is not None:
            yield f"trainer.greater_is_better={format_value(greater)}: trainer.keep_best names no metric"
        return
    if trainer.eval_strategy == "no":
        yield f"trainer.keep_best={metric}: this run has no evaluation; set trainer.eval_strategy to epoch or steps"
    if metric_names is not None and metric.removeprefix(EVALUATION_PREFIX) not in metric_names:
        known = ", ".join(sorted(f"{EVALUATION_PREFIX}{name}" for name in metric_names))
        yield f"trainer.keep_best={metric}: no evaluation measures it; allowed are {known}"
