"""The message about `trainer.learning_rate` with a single value: it names the rates of the parts that the run trains.

Imports neither torch nor a model.
"""

from argparse import ArgumentParser
from collections.abc import Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm.config.derived import training_keys
from vlm.config.packaged import run_names
from vlm.config.schema import HEAD, TrainerOptions

KEY = "trainer.learning_rate"
PART_KEYS = ("trainer/unfreeze", "trainer.unfreeze.", "trainer/lora", "trainer.lora.", "model/head")
"""How overrides begin that decide which parts train."""


def name_trained_rates(message: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """Return a message about a command line; where `trainer.learning_rate` has one value, with the rates that count.

    It stays as it is for a run of the user's own, and where the parts that train cannot be told.
    """
    if not message.startswith(f"{KEY}: it is a section."):
        return message
    args = parser.parse_known_args(words)[0]
    if args.config_name not in run_names():
        return message
    overrides = [word for word in args.overrides if word.lstrip("+~").startswith(PART_KEYS)]
    try:
        with hydra.initialize_config_module("vlm.config", version_base="1.3"):
            composed = hydra.compose(args.config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return message  # which has the first mistake of several
    trainer = OmegaConf.to_object(composed.trainer)
    assert isinstance(trainer, TrainerOptions)
    parts = [*training_keys(trainer), *([HEAD] if OmegaConf.select(composed, "model.head.task") else [])]
    value = next((word.partition("=")[2] for word in args.overrides if word.startswith(f"{KEY}=")), "…")
    rates = ", ".join(f"{KEY}.{part}_learning_rate={value}" for part in parts)
    return f"{KEY}: it is a section, with a rate for each part; of {args.config_name}'s parts that train: {rates}"
