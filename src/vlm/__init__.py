"""Compose, train and use vision-language models. `import vlm` imports nothing heavy; names load when asked for.

>>> from vlm import load
>>> model = load("outputs/run/final")  # doctest: +SKIP
>>> model.generate("What is in this picture?", ["cat.png"])  # doctest: +SKIP
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.inference.generate import VisionLanguageModel
    from vlm.inference.predict import Predictor
    from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMForPrediction, VLMPredictionConfig, VLMProcessor

    load = VisionLanguageModel.load

# Where bitsandbytes is installed, peft imports it, and it asks for a kernel that only 4 bits on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

MODELS = ("VLMConfig", "VLMForConditionalGeneration", "VLMForPrediction", "VLMPredictionConfig", "VLMProcessor")

__all__ = [
    "Predictor", "VLMConfig", "VLMForConditionalGeneration", "VLMForPrediction", "VLMPredictionConfig", "VLMProcessor",
    "VisionLanguageModel", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MODELS:
        from vlm import models

        return getattr(models, name)
    if name in ("VisionLanguageModel", "load"):
        from vlm.inference.generate import VisionLanguageModel

        return VisionLanguageModel if name == "VisionLanguageModel" else VisionLanguageModel.load
    if name == "Predictor":
        from vlm.inference.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
