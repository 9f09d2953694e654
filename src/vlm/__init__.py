"""Compose, train and use vision-language models. `import vlm` imports nothing heavy; names load on first use.

>>> from vlm import load
>>> model = load("outputs/run/final")  # doctest: +SKIP
>>> model.generate("What is in this image?", ["cat.png"])  # doctest: +SKIP
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.inference.embed import Embedder
    from vlm.inference.generate import VisionLanguageModel
    from vlm.inference.predict import Predictor
    from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMForPrediction, VLMPredictionConfig, VLMProcessor

    load = VisionLanguageModel.load

# Where bitsandbytes is installed, peft imports it, and it asks for a kernel that only 4 bits on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "Embedder",
    "Predictor",
    "VLMConfig",
    "VLMForConditionalGeneration",
    "VLMForPrediction",
    "VLMPredictionConfig",
    "VLMProcessor",
    "VisionLanguageModel",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    if name == "load":
        return import_module("vlm.inference.generate").VisionLanguageModel.load
    modules = {
        "Embedder": "vlm.inference.embed",
        "Predictor": "vlm.inference.predict",
        "VisionLanguageModel": "vlm.inference.generate",
    }
    return getattr(import_module(modules.get(name, "vlm.models")), name)
