"""The objectives by name. Imports no torch, so that a wrong name is refused in a second."""

from importlib import import_module

from vlm.config.schema import RunConfig
from vlm.train.objectives.base import Objective

OBJECTIVES = {
    "generation": "vlm.train.objectives.generation:Generation",
    "prediction": "vlm.train.objectives.prediction:Prediction",
}
"""`trainer.objective` -> its class; a class of the user's own is named `package.module:Class` in the same place."""


def make_objective(config: RunConfig) -> Objective:
    """Return the objective that `trainer.objective` names.

    Raises:
        ValueError: there is no such class.
    """
    name = config.trainer.objective
    module, _, attribute = OBJECTIVES.get(name, name).partition(":")
    if not attribute:
        raise ValueError(
            f"trainer.objective={name}: allowed are {', '.join(OBJECTIVES)}, or package.module:Class for your own"
        )
    try:
        return getattr(import_module(module), attribute)(config)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"trainer.objective={name}: {error}") from error
