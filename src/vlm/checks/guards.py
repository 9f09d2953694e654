"""What is wrong with the keys of a run's guards: values without an effect."""

from collections.abc import Iterator
from dataclasses import fields

from vlm.checks.fields import format_value
from vlm.config.schema import RunConfig, TrainerOptions

DEFAULTS = {field.name: field.default for field in fields(TrainerOptions)}


def guard_problems(config: RunConfig) -> Iterator[str]:
    """Yield keys on skipped updates or spikes that have no effect because the run never skips or detects them."""
    trainer = config.trainer
    skips = "skip" in (trainer.on_nonfinite, trainer.spike_action)
    unused = [] if skips else [("max_skipped_steps", "no update is skipped")]
    if trainer.spike_action is None:
        unused += [(name, "spikes are not detected") for name in ("spike_window", "spike_threshold")]
    for name, reason in unused:
        if (value := getattr(trainer, name)) != DEFAULTS[name]:
            yield f"trainer.{name}={format_value(value)}: {reason}, so it has no effect; leave it out"
