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
"""The file of a checkpoint that is complete only together with the base that it names; see `vlm.assembly`."""

LOWER_IS_BETTER = ("loss", "divergence", "mae", "mse", "rmse", "ece", "perplexity", "error")
"""Last words of the names of metrics of which lower values are better."""


def training_keys(trainer: TrainerOptions) -> dict[str, str]:
    """Return part -> the `key=value` that makes it train, as a whole or through an adapter; others are left out."""
    keys = {}
    for part in PARTS:
        lora: LoraPartConfig = getattr(trainer.lora, part)
        if getattr(trainer.unfreeze, TRAIN_FLAGS[part]):
            keys[part] = f"trainer.unfreeze.{TRAIN_FLAGS[part]}=true"
        elif lora.r is not None:
            keys[part] = f"trainer.lora.{part}.r={lora.r}"
    return keys


def zero_stage(deepspeed: str | Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage that `trainer.deepspeed` names; 0 where it names none."""
    if isinstance(deepspeed, str) and not Path(deepspeed).is_file():
        return int(deepspeed[-1]) if deepspeed.startswith("zero") and deepspeed[-1].isdigit() else 0
    settings = json.loads(Path(deepspeed).read_text(encoding="utf-8")) if isinstance(deepspeed, str) else deepspeed
    return (settings or {}).get("zero_optimization", {}).get("stage", 0)


def lower_is_better(metric: str) -> bool:
    """Return whether lower values of an evaluation's metric are better, by its name."""
    return metric.rpartition("_")[2] in LOWER_IS_BETTER


def shards_weights(trainer: TrainerOptions) -> bool:
    """Return whether a rank holds a share of the weights alone, by ZeRO-3 or FSDP2."""
    return zero_stage(trainer.deepspeed) == 3 or trainer.sharding is not None


def get_value(config: RunConfig, key: str) -> Any:
    """Return the value at a dotted key."""
    return attrgetter(key)(config)


def extra_tokens(model: ModelConfig) -> list[str]:
    """Return the tokens that the vocabulary gets: the user's, and those that heads read at."""
    return [*model.language_model.new_tokens, *query_tokens(model.head)]


def query_tokens(head: HeadsConfig) -> list[str]:
    """Return the tokens that stand behind every prompt, one for each head with `pooling=query`."""
    return [query_token(name) for name, settings in head.by_name.items() if settings.pooling == "query"]


def query_token(name: str) -> str:
    """Return the token of a head with `pooling=query`; no vocabulary has one of this form by itself."""
    return f"<|query:{name}|>"


def embedding_row_keys(config: RunConfig) -> dict[str, str]:
    """Return `language_model` -> the `key=value` that makes rows of its embeddings train; empty where none trains."""
    keys = [*_new_token_keys(config)]
    return {"language_model": keys[0]} if keys else {}


def caches_features(config: RunConfig) -> bool:
    """Return whether the hidden states that heads read are computed once: the body stays, and the run allows it."""
    is_frozen = not any(find_body_changes(config))
    return is_frozen and config.dataset.cache_features is not False and not shards_weights(config.trainer)


def find_body_changes(config: RunConfig) -> Iterator[str]:
    """Yield the `key=value` that make hidden states change in training."""
    yield from training_keys(config.trainer).values()
    yield from _new_token_keys(config)
    if config.model.head.generation_weight:
        yield f"model.head.generation_weight={config.model.head.generation_weight}"


def _new_token_keys(config: RunConfig) -> Iterator[str]:
    """Yield the `key=value` that add tokens whose embeddings are learned."""
    if tokens := config.model.language_model.new_tokens:
        yield f"model.language_model.new_tokens={tokens}"
    for name, settings in config.model.head.by_name.items():
        if settings.pooling == "query":
            yield f"{head_key(config.model.head, name)}.pooling=query"


def head_key(head: HeadsConfig, name: str) -> str:
    """Return the key of a head in the configuration."""
    return "model.head" if name == head.name else f"model.head.extra_heads.{name}"
