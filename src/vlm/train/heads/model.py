"""The heads of a model that trains: put on a body, made anew, calibrated."""

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm.assembly.heads import with_checkpoint_scales
from vlm.assembly.model_kinds import is_prediction_model
from vlm.config.model_schema import HeadsConfig
from vlm.evaluation.calibration import calibrate
from vlm.models import VLMForPrediction, VLMPredictionConfig
from vlm.models.heads import PredictionHead
from vlm.train.heads.outputs import HeadOutputs


def attach_heads(model: PreTrainedModel, config: VLMPredictionConfig, seed: int) -> VLMForPrediction:
    """Return a body with fresh heads, drawn by `seed` alone; or a model with heads, trained as `config` says."""
    if is_prediction_model(model):
        heads = model.heads.state_dict()
        model = VLMForPrediction(with_checkpoint_scales(config, model.config.settings), model.body)
        model.heads.load_state_dict(heads)
        return model
    torch.manual_seed(seed)
    return VLMForPrediction(config, model)


def reset_heads(model: VLMForPrediction, state: Mapping[str, Tensor]) -> None:
    """Give a model new heads with these weights: none that an earlier optimiser or rank still holds on to."""
    width = model.config.get_text_config().hidden_size
    model.heads = torch.nn.ModuleDict({head.name: PredictionHead(width, head) for head in model.config.settings})
    model.heads.load_state_dict(state)


def calibrate_heads(model: VLMForPrediction, head_outputs: Mapping[str, HeadOutputs], config: HeadsConfig) -> None:
    """Choose each head's temperature and threshold by its outputs for the evaluation records."""
    calibrated = []
    for head in model.config.settings:
        outputs = head_outputs[head.name]
        chosen = calibrate(head.task, outputs.outputs, outputs.targets, config.by_name[head.name].threshold_by)
        calibrated.append(asdict(replace(head, temperature=chosen.temperature, threshold=chosen.threshold)))
    model.config.heads = calibrated
