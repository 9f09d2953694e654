"""What follows from a configuration: which parts train and why, tokens that a run adds, what is cached.

Imports the schema only.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.config.schema import (
    PARTS,
    TRAIN_FLAGS,
    HeadsConfig,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    TrainerOptions,
)

BASE_FILE = "base.json"
"""What a folder holds that is complete together with the base that it names; `vlm.adapters` writes it."""


def training_keys(trainer: TrainerOptions) -> dict[str, str]:
    """Part -> the `key=value` that makes it train, as a whole or through an adapter; others are left out."""
    found = {}
    for part in PARTS:
        lora: LoraPartConfig = getattr(trainer.lora, part)
        if getattr(trainer.unfreeze, TRAIN_FLAGS[part]):
            found[part] = f"trainer.unfreeze.{TRAIN_FLAGS[part]}=true"
        elif lora.r is not None:
            found[part] = f"trainer.lora.{part}.r={lora.r}"
    return found


def zero_stage(deepspeed: Any) -> int:
    """The ZeRO stage that `trainer.deepspeed` names; 0 where it names none."""
    if isinstance(deepspeed, str):
        if Path(deepspeed).is_file():
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        else:
            return int(deepspeed[-1]) if deepspeed.startswith("zero") and deepspeed[-1].isdigit() else 0
    return (deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


def get_value(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


LOSSES = {
    "binary": ("bce", "focal"),
    "multiclass": ("ce", "focal"),
    "multilabel": ("bce", "focal"),
    "regression": ("mse", "huber"),
    "ordinal": ("ordinal",),
    "pairwise": ("margin",),
}
"""Task -> its losses; the first is its default."""


def extra_tokens(model: ModelConfig) -> list[str]:
    """Tokens that the vocabulary gets: the user's, and those that heads read at."""
    return [*model.language_model.new_tokens, *query_tokens(model.head)]


def query_tokens(head: HeadsConfig) -> list[str]:
    """The tokens that stand behind every prompt, one for each head that reads at one of its own."""
    return [query_token(name) for name, one in head.by_name.items() if one.pooling == "query"]


def query_token(name: str) -> str:
    """The token of a head with `pooling=query`; no vocabulary has one of this form by itself."""
    return f"<|query:{name}|>"


def embedding_row_keys(config: RunConfig) -> dict[str, str]:
    """`language_model` -> the `key=value` that makes some rows of its embeddings train; nothing where none does."""
    found = [*_find_new_token_rows(config)]
    return {"language_model": found[0]} if found else {}


def caches_features(config: RunConfig) -> bool:
    """Whether what heads read is computed once: wherever the body stays as it is, unless the run says otherwise."""
    stays = not any(_find_body_changes(config))
    return stays and config.dataset.cache_features is not False and zero_stage(config.trainer.deepspeed) < 3


def _find_body_changes(config: RunConfig) -> Iterator[str]:
    """What makes hidden states change in training."""
    yield from training_keys(config.trainer).values()
    yield from _find_new_token_rows(config)
    if config.model.head.generation_weight:
        yield f"model.head.generation_weight={config.model.head.generation_weight}"


def _find_new_token_rows(config: RunConfig) -> Iterator[str]:
    """What adds tokens whose embeddings are learned."""
    if tokens := config.model.language_model.new_tokens:
        yield f"model.language_model.new_tokens={tokens}"
    for name, one in config.model.head.by_name.items():
        if one.pooling == "query":
            yield f"{head_key(config.model.head, name)}.pooling=query"


def head_key(head: HeadsConfig, name: str) -> str:
    """Where a head stands in the configuration."""
    return "model.head" if name == head.name else f"model.head.extra_heads.{name}"
