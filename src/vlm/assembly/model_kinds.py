"""Kinds of configurations and models: composed of parts or of a family, with prediction heads on it or without.

Only this file and `vlm.hub` ask which class a model has.
"""

from typing import TypeGuard

from transformers import PreTrainedConfig, PreTrainedModel

from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMForPrediction, VLMPredictionConfig


def is_composed_config(config: PreTrainedConfig) -> TypeGuard[VLMConfig]:
    """Return whether a configuration is that of a model composed of parts."""
    return isinstance(config, VLMConfig)


def is_prediction_config(config: PreTrainedConfig) -> TypeGuard[VLMPredictionConfig]:
    """Return whether a configuration is that of a model with prediction heads."""
    return isinstance(config, VLMPredictionConfig)


def get_body_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the vision-language model under prediction heads; any other one unchanged."""
    return config.body_config if is_prediction_config(config) else config


def is_composed_model(model: object) -> TypeGuard[VLMForConditionalGeneration]:
    """Return whether a model is composed of parts, and has no prediction heads on it."""
    return isinstance(model, VLMForConditionalGeneration)


def is_prediction_model(model: object) -> TypeGuard[VLMForPrediction]:
    """Return whether a model has prediction heads."""
    return isinstance(model, VLMForPrediction)


def get_body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the vision-language model under prediction heads; any other model unchanged."""
    return model.body if is_prediction_model(model) else model


def get_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a composed model's language model; for a family, whose own code joins the parts, the whole model."""
    body = get_body(model)
    return body.language_model if is_composed_model(body) else body
