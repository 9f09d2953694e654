"""Hub code: the models, their processor and configurations, which are saved with every checkpoint.

The files here are flat and import torch, transformers and their siblings only (`from .x import Y`), because
`save_pretrained` copies them into checkpoints that load where `vlm` is not installed. Importing this package
registers the model types `vlm` and `vlm_prediction`, so that their checkpoints load here without remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from .configuration_prediction import VLMPredictionConfig
from .configuration_vlm import VLMConfig
from .modeling_prediction import VLMForPrediction
from .modeling_vlm import VLMForConditionalGeneration
from .processing_vlm import VLMProcessor

AutoConfig.register("vlm", VLMConfig, exist_ok=True)
AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(VLMConfig, VLMForConditionalGeneration, exist_ok=True)
AutoConfig.register("vlm_prediction", VLMPredictionConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForSequenceClassification):
    auto.register(VLMPredictionConfig, VLMForPrediction, exist_ok=True)

__all__ = ["VLMConfig", "VLMForConditionalGeneration", "VLMForPrediction", "VLMPredictionConfig", "VLMProcessor"]
