"""What a run starts from: a later stage is refused if its connector would be untrained."""

from vlm.checks.fields import ConfigError
from vlm.config.schema import RunConfig


def start_problem(config: RunConfig, name: str) -> str | None:
    """Return why a run has nothing to start from, or None if it has something or starts from its parts.

    A whole model (`model.hf_name`) starts from itself. Args: the configuration, and the name of the run.
    """
    trainer = config.trainer
    if trainer.starts_from is None or trainer.from_pretrained is not None or config.model.hf_name is not None:
        return None
    return (
        f"{name} starts from a model that {trainer.starts_from} trained, but trainer.from_pretrained is null: its "
        f"connector would be random. Give trainer.from_pretrained=outputs/…/final of {trainer.starts_from}, or "
        "trainer.starts_from=null to train a random connector on purpose"
    )


def check_start(config: RunConfig, name: str) -> None:
    """Refuse a later stage that has nothing to start from.

    Raises:
        ConfigError: with the key to set, and the key that allows this on purpose.
    """
    if (problem := start_problem(config, name)) is not None:
        raise ConfigError(problem)
