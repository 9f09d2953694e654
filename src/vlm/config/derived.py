"""What follows from a configuration: which parts train and why, which tokens a run adds, whether features are cached.

Imports the schema only.
"""

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from vlm.config.model_schema import HeadsConfig, ModelConfig
from vlm.config.schema import PARTS, TRAIN_FLAGS, LoraPartConfig, RunConfig, TrainerOptions

BASE_FILE = "base.json"
"""The file that names the base of an adapter checkpoint; see `vlm.assembly`."""

LOWER_IS_BETTER = ("loss", "divergence", "mae", "mse", "rmse", "ece", "perplexity", "error")
"""Last words of the names of metrics for which lower values are better."""
LOWER_IS_BETTER_NAMES = ("chair_i", "chair_s", "pope_unclear")
"""Further metrics of which this holds."""


def training_keys(trainer: TrainerOptions) -> dict[str, str]:
    """Return part -> the `key=value` that makes it train, as a whole or through an adapter, for parts that train."""
    keys = {}
    for part in PARTS:
        lora: LoraPartConfig = getattr(trainer.lora, part)
        if getattr(trainer.unfreeze, TRAIN_FLAGS[part]):
            keys[part] = f"trainer.unfreeze.{TRAIN_FLAGS[part]}=true"
        elif lora.r is not None:
            keys[part] = f"trainer.lora.{part}.r={lora.r}"
    return keys


def zero_stage(deepspeed: str | Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage of `trainer.deepspeed`, or 0 if it names none."""
    if isinstance(deepspeed, str) and not Path(deepspeed).is_file():
        return int(deepspeed[-1]) if deepspeed.startswith("zero") and deepspeed[-1].isdigit() else 0
    settings = json.loads(Path(deepspeed).read_text(encoding="utf-8")) if isinstance(deepspeed, str) else deepspeed
    return (settings or {}).get("zero_optimization", {}).get("stage", 0)


def lower_is_better(metric: str) -> bool:
    """Return whether lower values of an evaluation metric are better, judging by its name."""
    name = metric.partition("/")[0]  # `loss/SOURCE` is the loss of one source
    return name.rpartition("_")[2] in LOWER_IS_BETTER or name.endswith(LOWER_IS_BETTER_NAMES)


def shards_weights(trainer: TrainerOptions) -> bool:
    """Return whether each rank holds only a shard of the weights (ZeRO-3 or FSDP2)."""
    return zero_stage(trainer.deepspeed) == 3 or trainer.sharding is not None


def get_value(config: RunConfig, key: str) -> Any:
    """Return the value at a dotted key."""
    return attrgetter(key)(config)


def extra_tokens(model: ModelConfig) -> list[str]:
    """Return the tokens to add to the vocabulary: the user's, and those whose hidden states heads read."""
    return [*model.language_model.new_tokens, *query_tokens(model.head)]


def query_tokens(head: HeadsConfig) -> list[str]:
    """Return the tokens that follow every prompt, one for each head with `pooling=query`."""
    return [query_token(name) for name, settings in head.by_name.items() if settings.pooling == "query"]


def query_token(name: str) -> str:
    """Return the token of a head with `pooling=query`. No published vocabulary has a token of this form."""
    return f"<|query:{name}|>"


def embedding_row_keys(config: RunConfig) -> dict[str, str]:
    """Return `language_model` -> the `key=value` that makes rows of its embeddings train; empty if none trains."""
    keys = [*_new_token_keys(config)]
    return {"language_model": keys[0]} if keys else {}


def caches_features(config: RunConfig) -> bool:
    """Return whether the hidden states that heads read are computed once: the model is frozen, the run allows it."""
    is_frozen = not any(find_body_changes(config))
    return is_frozen and config.dataset.cache_features is not False and not shards_weights(config.trainer)


def find_body_changes(config: RunConfig) -> Iterator[str]:
    """Yield each `key=value` that makes hidden states change during training."""
    yield from training_keys(config.trainer).values()
    yield from _new_token_keys(config)
    if config.model.head.generation_weight:
        yield f"model.head.generation_weight={config.model.head.generation_weight}"


def _new_token_keys(config: RunConfig) -> Iterator[str]:
    """Yield each `key=value` that adds tokens whose embeddings train."""
    if tokens := config.model.language_model.new_tokens:
        yield f"model.language_model.new_tokens={tokens}"
    for name, settings in config.model.head.by_name.items():
        if settings.pooling == "query":
            yield f"{head_key(config.model.head, name)}.pooling=query"


def head_key(head: HeadsConfig, name: str) -> str:
    """Return the key of a head in the configuration."""
    return "model.head" if name == head.name else f"model.head.extra_heads.{name}"
