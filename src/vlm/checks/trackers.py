"""Checks of `trainer.report_to`: a tracker whose package is missing is refused before anything else begins."""

from collections.abc import Iterator
from importlib.util import find_spec

from vlm.config.schema import TrainerOptions

TRACKERS = {
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "trackio": ("trackio", "pip install 'small-vlm[trackio]'"),
    "wandb": ("wandb", "pip install 'small-vlm[track]'"),
    "mlflow": ("mlflow", "pip install 'small-vlm[mlflow]'"),
    "comet_ml": ("comet_ml", "pip install comet_ml"),
    "clearml": ("clearml", "pip install clearml"),
    "swanlab": ("swanlab", "pip install swanlab"),
    "neptune": ("neptune", "pip install neptune"),
    "dvclive": ("dvclive", "pip install dvclive"),
    "codecarbon": ("codecarbon", "pip install codecarbon"),
}
"""Name in `trainer.report_to` -> the module that it needs, and the command that installs it."""


def tracker_problems(trainer: TrainerOptions) -> Iterator[str]:
    """Yield the trackers of a run that are not installed."""
    for name in _list_trackers(getattr(trainer, "report_to", None)):
        module, command = TRACKERS.get(name, (None, ""))
        if module is not None and find_spec(module) is None:
            yield f"trainer.report_to={name}: {module} is not installed. {command}, or choose tensorboard or none"


def _list_trackers(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [str(name) for name in value] if isinstance(value, list) else []
