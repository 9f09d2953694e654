"""The entry point `lmms_eval.models`, by which lmms-eval finds `lmms_eval --model vlm`. Imports no torch."""


def manifest() -> object:
    """Return a `ModelManifest`: the model's name and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]: of `.venv-eval`

    return ModelManifest("vlm", simple_class_path="vlm.evaluation.lmms_model.LmmsModel")
