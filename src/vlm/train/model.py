"""Preparing a loaded model for training: adapters, frozen parts, precision, kernels, checkpointing, compilation."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from vlm.assembly.heads import new_token_ids
from vlm.assembly.quantization import set_compute_dtype
from vlm.config.schema import RunConfig
from vlm.data.processor import Processor
from vlm.train.lora import add_adapter
from vlm.train.parts import Part, cast, freeze, make_parts
from vlm.train.step.activation_checkpointing import enable_activation_checkpointing
from vlm.train.step.compile import compile_layers
from vlm.train.step.liger import apply_liger_kernels


def prepare(
    model: PreTrainedModel,
    config: RunConfig,
    args: TrainingArguments,
    processor: Processor,
    unused_forms: Sequence[str] = (),
) -> list[Part]:
    """Make a loaded model ready to train, and return its parts; `unused_forms` as of `make_parts`."""
    trained_dtype = torch.float32 if args.deepspeed is None else compute_dtype(args)
    add_adapter(model, config.trainer.lora, args.seed, trained_dtype, unused_forms)
    new_tokens = new_token_ids(config.model, processor.tokenizer)
    parts = make_parts(model, config.trainer, config.model, new_tokens, unused_forms)
    freeze(parts)
    if not is_deepspeed_zero3_enabled():
        cast(model, parts, trained_dtype, compute_dtype(args))
    set_compute_dtype(model, compute_dtype(args))
    if args.use_liger_kernel:
        apply_liger_kernels(model, args.liger_kernel_config)
        args.use_liger_kernel = False  # `Trainer` would look for the whole model in Liger's list
    enable_activation_checkpointing(model, parts, config.trainer, args)
    compile_layers(model, args)
    return parts


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the precision of matrix products."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
