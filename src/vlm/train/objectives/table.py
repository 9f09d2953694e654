"""The objectives by name. Imports no torch, so that a wrong name is refused in a second."""

import os
import sys
from importlib import import_module

from vlm.checks.fields import ConfigError
from vlm.config.schema import RunConfig
from vlm.train.objectives.base import Objective

OBJECTIVES = {
    "generation": "vlm.train.objectives.generation:Generation",
    "prediction": "vlm.train.objectives.prediction:Prediction",
}
"""`trainer.objective` -> its class; a class of the user's own is named `package.module:Class` in the same place."""


def make_objective(config: RunConfig) -> Objective:
    """Return the objective of a run: the one that `trainer.objective` names, else the one that its model is for.

    Raises:
        ConfigError: there is no such class, or it is no objective.
    """
    name = config.trainer.objective or ("prediction" if config.model.head.by_name else "generation")
    module, _, attribute = OBJECTIVES.get(name, name).partition(":")
    if not attribute:
        raise ConfigError(
            f"trainer.objective={name}: allowed are {', '.join(OBJECTIVES)}, or package.module:Class for your own"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a class of the user's own may lie; `python -m` has it anyway
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"trainer.objective={name}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(f"trainer.objective={name}: a subclass of {Objective.__module__}:Objective is needed")
    return kind(config)
