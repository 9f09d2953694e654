"""Settings that do not work with `trainer.sharding=fsdp2`. Imports the schema only."""

from collections.abc import Iterator

from vlm.checks.lora import QUANTIZABLE_PARTS
from vlm.config.choices import FSDP2_OPTIMIZERS
from vlm.config.derived import embedding_row_keys
from vlm.config.named import is_custom_name
from vlm.config.schema import RunConfig


def sharding_problems(config: RunConfig) -> Iterator[str]:
    """Yield what contradicts FSDP2 in a configuration: the key, its value and what to do."""
    trainer = config.trainer
    if trainer.sharding is None:
        return
    key = f"trainer.sharding={trainer.sharding}"
    if trainer.deepspeed:
        yield f"{key} and trainer.deepspeed: both shard the model; choose one (trainer/deepspeed=none)"
    if trainer.fp16:
        yield f"{key} and trainer.fp16=true: it does not scale gradients; choose trainer.bf16=true"
    if trainer.save_on_each_node:
        yield (
            f"{key} and trainer.save_on_each_node=true: each rank reads files of a checkpoint that other ranks wrote; "
            "choose a trainer.output_dir that all nodes share, or trainer.deepspeed=zero3"
        )
    if trainer.torch_compile:
        yield (
            f"{key} and trainer.torch_compile=true: layers gather their weights as they run, which cannot be "
            "compiled; leave one out"
        )
    for part in QUANTIZABLE_PARTS:
        if (kind := getattr(config.model, part).quantization) is not None:
            yield (
                f"model.{part}.quantization={kind} and {key}: quantised weights are not sharded; choose "
                "trainer/deepspeed=zero2, or leave the quantisation out"
            )
    for reason in () if trainer.unfreeze.train_language_model else embedding_row_keys(config).values():
        yield (
            f"{reason} and {key}: rows of an embedding cannot train alone under FSDP2; choose trainer/deepspeed="
            "zero2, or trainer.unfreeze.train_language_model=true"
        )
    if trainer.optim not in (None, *FSDP2_OPTIMIZERS) and not is_custom_name(trainer.optim):
        yield (
            f"trainer.optim={trainer.optim} and {key}: its states differ in shape from the weights, or need whole "
            f"weights; choose {', '.join(FSDP2_OPTIMIZERS)}"
        )
