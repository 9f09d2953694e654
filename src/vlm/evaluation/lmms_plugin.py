"""What lmms-eval finds of this package (entry point `lmms_eval.models`): `lmms_eval --model vlm`. Imports no torch."""

from typing import Any


def manifest() -> Any:
    """The name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]: of `.venv-eval`

    return ModelManifest("vlm", simple_class_path="vlm.evaluation.lmms_model.LmmsModel")
