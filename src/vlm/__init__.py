"""Compose, train and use vision-language models. `import vlm` imports nothing heavy; names load when asked for.

>>> from vlm import load
>>> model = load("outputs/run/final")  # doctest: +SKIP
>>> model.generate("What is in this picture?", ["cat.png"])  # doctest: +SKIP
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.inference.generate import VisionLanguageModel
    from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor

    load = VisionLanguageModel.load

# Where bitsandbytes is installed, peft imports it, and it asks for a kernel that only 4 bits on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["VLMConfig", "VLMForConditionalGeneration", "VLMProcessor", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    if name in ("VLMConfig", "VLMForConditionalGeneration", "VLMProcessor"):
        from vlm import models

        return getattr(models, name)
    if name in ("VisionLanguageModel", "load"):
        from vlm.inference.generate import VisionLanguageModel

        return VisionLanguageModel if name == "VisionLanguageModel" else VisionLanguageModel.load
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
