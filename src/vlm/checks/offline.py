"""Models that would have to come from the Hub while the user has told its client to stay offline. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from vlm.checks.fields import ConfigError
from vlm.config.schema import RunConfig

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""The environment variables that keep the Hub's client from the network."""


def check_offline(config: RunConfig) -> None:
    """Refuse a run that begins with a model which is neither in a folder nor in the cache, where the Hub is not asked.

    Raises:
        ConfigError: with the key that names the model, and both ways out.
    """
    if any(os.environ.get(name) for name in OFFLINE_VARIABLES):  # the client of the Hub is imported for these only
        for key, name, revision in _named_models(config):
            if problem := offline_problem(name, f"{key}={name}", revision):
                raise ConfigError(problem)


def offline_problem(name: str, label: str, revision: str | None = None) -> str | None:
    """Return why a model cannot be opened while the Hub's client is offline, in words; None if it is online.

    Args:
        name: folder or name on the Hub. Of folders and of names in the cache nothing is said.
        label: what the message calls it, such as `model.hf_name=NAME`.
        revision: branch, tag or commit.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not constants.is_offline_mode() or Path(name).is_dir():
        return None
    try:
        if try_to_load_from_cache(name, "config.json", revision=revision) is not None:  # its absence may be known, too
            return None
    except HFValidationError:  # no name that the Hub can have: the library says so without asking
        return None
    variable = next((name for name in OFFLINE_VARIABLES if os.environ.get(name)), OFFLINE_VARIABLES[0])
    cache = constants.HF_HUB_CACHE
    return (
        f"{label}: no such folder (seen from {Path.cwd()}), it is not in the cache of the Hub ({cache}), "
        f"and {variable} is set. Name a folder instead, such as trainer.from_pretrained=outputs/…/final, or unset "
        f"{variable} to download it"
    )


def _named_models(config: RunConfig) -> Iterator[tuple[str, str, str | None]]:
    """Yield the key, the name and the revision of each model that a run begins with."""
    model, start = config.model, config.trainer.from_pretrained
    if start:
        yield "trainer.from_pretrained", start, None
    elif model.hf_name is not None:
        yield "model.hf_name", model.hf_name, model.revision
    else:
        for part in ("visual_encoder", "language_model"):
            source = getattr(model, part)
            yield f"model.{part}.hf_name", source.hf_name, source.revision
