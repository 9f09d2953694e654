"""What is wrong with adapters (`trainer.lora`) and quantised parts (`quantization`). Imports the schema only."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vlm.config.derived import BASE_FILE, zero_stage
from vlm.config.schema import PARTS, TRAIN_FLAGS, LoraPartConfig, RunConfig, TrainerOptions

QUANTIZABLE_PARTS = ("visual_encoder", "language_model")
"""The parts that have a key `quantization`."""


def lora_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the adapters of a run."""
    trainer, lora = config.trainer, config.trainer.lora
    for part in PARTS:
        adapter: LoraPartConfig = getattr(lora, part)
        key, flag = f"trainer.lora.{part}", TRAIN_FLAGS[part]
        if adapter.r is None:
            for name in ("alpha", "target_modules"):
                if (value := getattr(adapter, name)) is not None:
                    yield f"{key}.{name}={value}: it has no effect without {key}.r"
            continue
        if adapter.target_modules == []:
            yield f"{key}.target_modules=[]: give the endings of names of layers, or null for all Linear layers"
        if lora.init == "orthogonal" and adapter.r % 2:
            yield f"{key}.r={adapter.r}: trainer.lora.init=orthogonal needs an even rank"
        if getattr(trainer.unfreeze, flag):
            yield (
                f"{key}.r={adapter.r} and trainer.unfreeze.{flag}=true: an adapter needs a frozen part; "
                f"choose one ({key}.r=null, or trainer.unfreeze.{flag}=false)"
            )
    if _starts_from_adapter(trainer) and zero_stage(trainer.deepspeed) == 3:
        checkpoint = trainer.from_pretrained
        yield (
            f"trainer.from_pretrained={checkpoint}: an adapter is merged into its base as it is loaded, which ZeRO-3 "
            f"cannot do. Merge it first: vlm merge-lora {checkpoint} OUT, then trainer.from_pretrained=OUT"
        )


def _starts_from_adapter(trainer: TrainerOptions) -> bool:
    return trainer.from_pretrained is not None and Path(trainer.from_pretrained, BASE_FILE).is_file()


def quantization_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the quantised parts of a run."""
    trainer, checkpoint = config.trainer, config.trainer.from_pretrained
    kinds = {part: kind for part in QUANTIZABLE_PARTS if (kind := getattr(config.model, part).quantization) is not None}
    for part, kind in kinds.items():
        key, flag = f"model.{part}.quantization={kind}", TRAIN_FLAGS[part]
        if getattr(trainer.unfreeze, flag):
            adapter = f"train an adapter on it (trainer.lora.{part}.r=…)"
            yield f"{key} and trainer.unfreeze.{flag}=true: a quantised part stays frozen; {adapter}"
        if _starts_from_adapter(trainer):
            yield (
                f"{key}: trainer.from_pretrained={checkpoint} is an adapter, which is merged into weights that are "
                f"stored in full. Merge it first: vlm merge-lora {checkpoint} OUT, then trainer.from_pretrained=OUT"
            )
        if zero_stage(trainer.deepspeed) == 3:
            yield f"{key}: ZeRO-3 cannot shard quantised weights; choose trainer/deepspeed=zero2"
        if find_spec("bitsandbytes") is None:
            yield f"{key}: bitsandbytes is not installed: pip install 'small-vlm[quant]'"
    if len(set(kinds.values())) > 1:
        listing = " and ".join(f"model.{part}.quantization={kind}" for part, kind in kinds.items())
        yield f"{listing}: these must be equal; choose one"
