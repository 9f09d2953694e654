"""What contradicts adapters (`trainer.lora`) and quantised parts (`quantization`), in words.

Imports the schema only. `check.py` raises the first of these problems.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vlm.config.derived import BASE_FILE, zero_stage
from vlm.config.schema import PARTS, TRAIN_FLAGS, LoraConfig, LoraPartConfig, RunConfig

QUANTIZABLE_PARTS = ("visual_encoder", "language_model")
"""The parts that have a key `quantization`."""


def lora_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the adapters of a run."""
    trainer, lora = config.trainer, config.trainer.lora
    for part in PARTS:
        own: LoraPartConfig = getattr(lora, part)
        key, flag = f"trainer.lora.{part}", TRAIN_FLAGS[part]
        if own.r is None:
            for name in ("alpha", "target_modules"):
                if getattr(own, name) is not None:
                    yield f"{key}.{name}={getattr(own, name)}: nothing comes of it without {key}.r"
            continue
        yield from _part_problems(key, own, lora)
        if getattr(trainer.unfreeze, flag):
            yield (
                f"{key}.r={own.r} and trainer.unfreeze.{flag}=true: an adapter trains on a part that is frozen; choose "
                f"one ({key}.r=null, or trainer.unfreeze.{flag}=false)"
            )
    if not 0 <= lora.dropout < 1:
        yield f"trainer.lora.dropout={lora.dropout}: a share from 0 to below 1 is needed"
    started = trainer.from_pretrained
    if started is not None and Path(started, BASE_FILE).is_file() and zero_stage(trainer.deepspeed) == 3:
        yield (
            f"trainer.from_pretrained={started}: an adapter is merged into its base as it is loaded, which ZeRO-3 "
            f"cannot do. Merge it first: vlm merge-lora {started} OUT, then trainer.from_pretrained=OUT"
        )


def _part_problems(key: str, own: LoraPartConfig, lora: LoraConfig) -> Iterator[str]:
    assert own.r is not None
    for name in ("r", "alpha"):
        value = getattr(own, name)
        if value is not None and value < 1:
            yield f"{key}.{name}={value}: at least 1, or null, is needed"
    if own.target_modules == []:
        yield f"{key}.target_modules=[]: name endings of layers, or null for all Linear layers, are needed"
    if lora.init == "orthogonal" and own.r % 2:
        yield f"{key}.r={own.r}: trainer.lora.init=orthogonal needs an even rank"


def quantization_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the quantised parts of a run."""
    kinds = {part: kind for part in QUANTIZABLE_PARTS if (kind := getattr(config.model, part).quantization) is not None}
    for part, kind in kinds.items():
        key, flag = f"model.{part}.quantization={kind}", f"trainer.unfreeze.{TRAIN_FLAGS[part]}"
        if getattr(config.trainer.unfreeze, TRAIN_FLAGS[part]):
            yield (
                f"{key} and {flag}=true: a quantised part stays frozen; train an adapter on it "
                f"(trainer.lora.{part}.r=…)"
            )
        started = config.trainer.from_pretrained
        if started is not None and Path(started, BASE_FILE).is_file():
            yield (
                f"{key}: trainer.from_pretrained={started} is an adapter, which is merged into weights that are stored "
                f"in full. Merge it first: vlm merge-lora {started} OUT, then trainer.from_pretrained=OUT"
            )
        if zero_stage(config.trainer.deepspeed) == 3:
            yield f"{key}: ZeRO-3 cannot shard quantised weights; choose trainer/deepspeed=zero2"
        if find_spec("bitsandbytes") is None:
            yield f"{key}: bitsandbytes is not installed: pip install 'small-vlm[quant]'"
    if len(set(kinds.values())) > 1:
        said = " and ".join(f"model.{part}.quantization={kind}" for part, kind in kinds.items())
        yield f"{said}: choose one for both"
