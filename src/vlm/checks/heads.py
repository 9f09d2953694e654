"""What contradicts prediction heads (`model.head`) and how they are evaluated, in words.

Imports the schema and the other checks' helpers only. `check.py` raises the first of these problems. The tables here
name what `vlm.models` has, which would import torch; a test holds them against it.
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from vlm.config.derived import (
    LOSSES,
    _find_body_changes,
    _find_new_token_rows,
    caches_features,
    head_key,
    query_tokens,
    training_keys,
)
from vlm.config.schema import DatasetConfig, HeadConfig, HeadsConfig, RunConfig

LOSS_OPTIONS = {"focal": ("gamma",), "huber": ("delta",), "margin": ("margin",)}
"""Loss -> its options."""
HEAD_TYPES = {
    "linear": ("input_norm", "dropout"),
    "mlp": ("hidden_dim", "num_layers", "input_norm", "dropout"),
}
"""Head -> its options."""
POOLINGS = ("last", "mean", "image", "text", "attention", "query", "token", "first", "alltoken")
THRESHOLD_CRITERIA = ("f1", "accuracy", "youden", "none")
CLASSIFICATION_TASKS = ("binary", "multiclass", "multilabel", "ordinal")
TASKS_WITH_THRESHOLD = ("binary", "multilabel")
CUSTOM_CLASS_PATTERN = re.compile(r"[\w.]+:\w+")
SAMPLING_KEY, GROUPED_SAMPLING = "train_sampling_strategy", "group_by_modality_length"


def head_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the heads of a run."""
    head = config.model.head
    if head.name in head.extra_heads:
        yield f"model.head.extra_heads.{head.name}: the first head has that name (model.head.name)"
    for name, one in head.by_name.items():
        key = head_key(head, name)
        if not name.isidentifier():
            yield f"{key}: {name!r} is no name of a head; letters, digits and _ are needed"
        yield from _single_head_problems(key, one)
    if head.weight != 1 and not head.extra_heads and not head.generation_weight:
        yield f"model.head.weight={head.weight}: there is no other loss that it counts beside; leave it out"
    for key, value in (("profile", config.trainer.profile or None), ("peak_tflops", config.trainer.peak_tflops)):
        if value is not None:
            yield f"trainer.{key}={_format_value(value)}: what heads compute is neither profiled nor counted; leave it out"
    yield from _generation_problems(config)
    yield from _data_problems(config)


def _generation_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with learning replies beside the heads."""
    head = config.model.head
    key = f"model.head.generation_weight={head.generation_weight}"
    if head.generation_weight < 0:
        yield f"{key}: 0 or more is needed"
    if head.generation_weight and query_tokens(head):
        yield (
            f"{key}: with pooling=query a token stands behind the prompt, where the reply would begin; choose another "
            "pooling"
        )
    if head.generation_weight and not training_keys(config.trainer) and not [*_find_new_token_rows(config)]:
        yield f"{key}: no part trains that writes replies; unfreeze one (trainer.unfreeze), or adapt one (trainer.lora)"


def unused_head_problems(config: RunConfig) -> Iterator[str]:
    """Yield the keys of heads that a run without heads sets."""
    data = config.dataset
    for key in ("test_path", "test_image_folder", "test_split", "folds"):
        if (value := getattr(data, key)) != getattr(DatasetConfig, key):
            yield f"dataset.{key}={_format_value(value)}: this is for prediction heads; choose one, as model/head=binary"
    for key in fields(HeadsConfig):
        default = key.default if key.default_factory is MISSING else key.default_factory()
        value = getattr(config.model.head, key.name)
        if value != default:
            said = ", ".join(value) if key.name == "extra_heads" else _format_value(value)
            yield f"model.head.{key.name}={said}: there is no head (model.head.task); choose one, as model/head=binary"


def _single_head_problems(key: str, one: HeadConfig) -> Iterator[str]:
    """What is wrong with one head."""
    if one.task not in LOSSES:
        yield f"{key}.task={one.task}: allowed are {', '.join(LOSSES)}"
        return
    if one.pooling not in POOLINGS:
        yield f"{key}.pooling={one.pooling}: allowed are {', '.join(POOLINGS)}"
    if (one.pooling == "token") != (one.token is not None):
        yield f"{key}.pooling={one.pooling}, {key}.token={one.token}: pooling=token and a token belong together"
    if one.loss is not None and one.loss not in LOSSES[one.task]:
        yield f"{key}.loss={one.loss}: for task={one.task} allowed are {', '.join(LOSSES[one.task])}"
    if one.type in HEAD_TYPES:
        yield from _unknown_options(f"{key}.options", one.options, HEAD_TYPES[one.type], one.type)
    elif not CUSTOM_CLASS_PATTERN.fullmatch(one.type):
        yield f"{key}.type={one.type}: allowed are {', '.join(HEAD_TYPES)}, or package.module:Class for your own"
    loss = one.loss or LOSSES[one.task][0]
    yield from _unknown_options(f"{key}.loss_options", one.loss_options, LOSS_OPTIONS.get(loss, ()), loss)
    if one.threshold_by not in THRESHOLD_CRITERIA:
        yield f"{key}.threshold_by={one.threshold_by}: allowed are {', '.join(THRESHOLD_CRITERIA)}"
    elif one.task not in TASKS_WITH_THRESHOLD and one.threshold_by != HeadConfig.threshold_by:
        yield f"{key}.threshold_by={one.threshold_by}: task={one.task} has no threshold; leave it out"
    if not 0 <= one.label_smoothing < 1:
        yield f"{key}.label_smoothing={one.label_smoothing}: a share from 0 to below 1 is needed"
    if one.weight <= 0:
        yield f"{key}.weight={one.weight}: a number above 0 is needed"
    if isinstance(one.labels, list) and len(one.labels) < (1 if one.task == "multilabel" else 2):
        yield f"{key}.labels={one.labels}: at least two are needed, or null for those of the training records"
    if one.task == "binary" and one.labels is not None and len(one.labels) != 2:
        yield f"{key}.labels={one.labels}: task=binary has two, the negative and the positive one"
    if one.task not in CLASSIFICATION_TASKS:
        for name, value in (("labels", one.labels), ("class_weights", one.class_weights)):
            if value is not None:
                yield f"{key}.{name}={value}: task={one.task} has no labels to choose among"
        if one.label_smoothing:
            yield f"{key}.label_smoothing={one.label_smoothing}: task={one.task} has no labels to choose among"
        return
    if not (one.class_weights in (None, "balanced") or _is_list_of_numbers(one.class_weights)):
        yield f"{key}.class_weights={one.class_weights}: balanced, a list of numbers above 0, or null is needed"
    elif isinstance(one.class_weights, list) and one.labels is not None and len(one.class_weights) != len(one.labels):
        yield f"{key}.class_weights={one.class_weights}: one for each of {len(one.labels)} labels is needed"


def _unknown_options(key: str, given: dict[str, Any], allowed: tuple[str, ...], of: str) -> Iterator[str]:
    """Options that something does not take."""
    for name, value in given.items():
        if value is not None and name not in allowed:
            yield f"{key}.{name}={value}: {of} does not take it; allowed are {', '.join(allowed) or 'none'}"


def _is_list_of_numbers(value: Any) -> bool:
    numbers = isinstance(value, list) and not any(isinstance(one, bool) for one in value)
    return numbers and all(isinstance(one, int | float) and one > 0 for one in value)


def _format_value(value: Any) -> str:
    """A value as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _data_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with how a head's records are held out and kept."""
    data = config.dataset
    if data.streaming:
        yield "dataset.streaming=true: a head's records are counted and split before it trains; leave it out"
    if data.over_length == "truncate":
        yield "dataset.over_length=truncate: a prompt is never cut, its end is what is read; choose skip or error"
    if data.test_path is not None and data.test_split:
        yield "dataset.test_path and dataset.test_split: choose one"
    if not 0 <= data.test_split < 1:
        yield f"dataset.test_split={data.test_split}: a share from 0 to below 1 is needed"
    if data.test_image_folder is not None and data.test_path is None:
        yield f"dataset.test_image_folder={data.test_image_folder}: nothing comes of it without dataset.test_path"
    if data.eval_split == 0 and data.eval_path is None and data.folds is None:
        yield (
            f"dataset.eval_split={data.eval_split}: temperature and threshold are chosen on evaluation records; give a "
            "share, dataset.eval_path or dataset.folds"
        )
    if data.folds is not None:
        if data.folds < 2:
            yield f"dataset.folds={data.folds}: at least 2 are needed"
        for key in ("eval_path", "eval_split"):
            if getattr(data, key):
                yield f"dataset.folds={data.folds} and dataset.{key}={getattr(data, key)}: choose one"
        if data.max_eval_samples is not None:
            yield f"dataset.folds={data.folds} and dataset.max_eval_samples={data.max_eval_samples}: choose one"
    sampling: Any = getattr(config.trainer, SAMPLING_KEY)
    if caches_features(config) and sampling == GROUPED_SAMPLING:
        yield (
            f"trainer.{SAMPLING_KEY}={sampling}: hidden states are computed once here, and there is nothing to group; "
            "choose random, or dataset.cache_features=false"
        )
    wants = "dataset.cache_features=true" if data.cache_features else None
    wants = f"dataset.folds={data.folds}" if data.folds is not None else wants
    if wants is not None and not caches_features(config):
        moving = next(_find_body_changes(config), None)
        if moving is None and data.cache_features is False:
            moving = "dataset.cache_features=false"
        yield f"{wants}: hidden states are computed once, but {moving or 'trainer.deepspeed=zero3'} does not allow that"
