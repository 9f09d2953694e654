"""The objectives by name. Imports no torch, so that a wrong name is refused in a second."""

from vlm.checks.fields import ConfigError
from vlm.config.named import import_named, import_packaged, is_custom_name
from vlm.config.schema import RunConfig
from vlm.train.objectives.base import Objective

OBJECTIVES = {
    "generation": "vlm.train.objectives.generation:Generation",
    "distillation": "vlm.train.objectives.distillation:Distillation",
    "prediction": "vlm.train.objectives.prediction:Prediction",
    "embedding": "vlm.train.objectives.embedding:Embedding",
    "preference": "vlm.train.objectives.preference:Preference",
}
"""`trainer.objective` -> its class; a class of the user's own is named `package.module:Class` in the same place."""


def make_objective(config: RunConfig) -> Objective:
    """Return the objective of a run: the one that `trainer.objective` names, else the one that its model is for.

    The configuration, which is recorded in the run directory, names it afterwards.
    """
    name = config.trainer.objective or ("prediction" if config.model.head.by_name else "generation")
    if name not in OBJECTIVES and not is_custom_name(name):
        raise ConfigError(
            f"trainer.objective={name}: allowed are {', '.join(OBJECTIVES)}, or package.module:Class for your own"
        )
    try:
        packaged = OBJECTIVES.get(name)
        kind = import_named(name, "trainer.objective") if packaged is None else import_packaged(packaged)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(f"trainer.objective={name}: a subclass of {Objective.__module__}:Objective is needed")
    config.trainer.objective = name
    return kind(config)
