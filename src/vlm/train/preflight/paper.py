"""A run's model without weights, prepared as one process without sharding prepares it: memory is counted on it."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlm.assembly.model_kinds import is_composed_config
from vlm.config.derived import embedding_row_keys
from vlm.config.schema import RunConfig
from vlm.data.processor import Processor
from vlm.families.meta_model import build_meta_model
from vlm.models import VLMForConditionalGeneration
from vlm.train.arguments import training_arguments
from vlm.train.model import prepare
from vlm.train.objectives.base import Objective
from vlm.train.parts import Part


def paper_config(config: RunConfig) -> RunConfig:
    """Return the configuration of a run of one process without sharding, whose memory others are computed from."""
    paper = copy.deepcopy(config)
    changes = {
        "deepspeed": None,
        "sharding": None,
        "use_cpu": True,
        "tf32": None,
        "report_to": "none",
        "fp16": False,
        "torch_compile": False,
        "use_liger_kernel": False,
    }
    for key, value in changes.items():
        setattr(paper.trainer, key, value)
    unset_hf_deepspeed_config()
    return paper


def build_without_weights(model_config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model on the meta device, with kernels of attention as runs choose them."""
    if not is_composed_config(model_config):
        return build_meta_model(model_config)
    with torch.device("meta"):
        return VLMForConditionalGeneration(copy.deepcopy(model_config))


def prepare_on_paper(
    objective: Objective, model_config: PreTrainedConfig, processor: Processor, *, half: bool = False
) -> tuple[PreTrainedModel, RunConfig, TrainingArguments, list[Part]]:
    """Return a run's model without weights, ready to train, with the configuration and the arguments it was made with.

    It changes what libraries keep for the process, see `libraries.py`. `half` sets the precision of matrix products to
    bfloat16, also on a machine without it.
    """
    paper = paper_config(objective.config)
    args = training_arguments(paper.trainer, [*objective.training_keys(), *embedding_row_keys(paper)])
    args.bf16 = args.bf16 or half
    model = build_without_weights(model_config)
    parts = prepare(model, paper, args, processor)
    return model, paper, args, parts
