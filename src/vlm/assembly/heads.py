"""From the `head` section to what a checkpoint holds of prediction heads, and the tokens that they need.

Imports the schema, the hub code and the labels of data.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from vlm.config.choices import LOSSES
from vlm.config.derived import extra_tokens, head_key, query_token, query_tokens
from vlm.config.schema import HeadConfig, ModelConfig
from vlm.data.encoding.labels import get_media_token_ids
from vlm.data.heads.labels import HeadLabels, label_mean_and_std
from vlm.models.configuration_prediction import HeadSettings, VLMPredictionConfig
from vlm.models.heads import HEADS
from vlm.models.modeling_prediction import make_head


def add_tokens(model: ModelConfig, tokenizer: Any) -> None:
    """Give a tokenizer the tokens that a run adds; it reads them wherever they are written."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in extra_tokens(model) if token not in known])


def new_token_ids(model: ModelConfig, tokenizer: Any) -> list[int]:
    """The ids of the tokens whose embeddings a run learns."""
    return tokenizer.convert_tokens_to_ids(extra_tokens(model))


def grow_embeddings(body: Any, tokenizer: Any) -> None:
    """Give a model a row for each token; a new one is drawn around the mean of the others."""
    if len(tokenizer) > body.get_input_embeddings().num_embeddings:
        body.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def suffix_ids(model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The ids that stand behind every prompt."""
    return tuple(tokenizer.convert_tokens_to_ids(query_tokens(model.head)))


def resolve_heads(
    model: ModelConfig, body_config: Any, processor: Any, labels: Sequence[HeadLabels],
    targets: Mapping[str, np.ndarray],
) -> VLMPredictionConfig:  # fmt: skip
    """The configuration of a model with the heads that a run asks for.

    Args:
        model: the run's section.
        body_config: of the body.
        processor: the run's.
        labels: what each head chooses among.
        targets: head -> `(N, width)`, the training records' targets, NaN where a record has none.

    Raises:
        ValueError: a head does not fit the body, or its options.
    """
    settings = [
        asdict(
            _make_head_settings(
                head_key(model.head, own.name), one, own, targets[own.name], processor.tokenizer, body_config
            )
        )
        for own, one in zip(labels, model.head.by_name.values(), strict=True)
    ]
    return VLMPredictionConfig(
        body_config=body_config, heads=settings, media_token_ids=get_media_token_ids(processor),
        suffix="".join(query_tokens(model.head)), suffix_ids=suffix_ids(model, processor.tokenizer),
        generation_weight=model.head.generation_weight, recipe=asdict(model),
        hidden_size=body_config.get_text_config().hidden_size,  # asked for by DeepSpeed's integration
    )  # fmt: skip


def _make_head_settings(
    key: str, one: HeadConfig, labels: HeadLabels, targets: np.ndarray, tokenizer: Any, body_config: Any
) -> HeadSettings:  # fmt: skip
    """One head, settled; `key` is where it stands in the configuration."""
    assert one.task is not None
    if hasattr(nn.ModuleDict(), labels.name):
        raise ValueError(f"{key}: torch gives modules something of the name {labels.name}; choose another one")
    register_head_class(one.type, f"{key}.type")
    text = body_config.get_text_config()
    if one.layer is not None and not -text.num_hidden_layers - 1 <= one.layer <= text.num_hidden_layers:
        raise ValueError(
            f"{key}.layer={one.layer}: the language model has hidden states 0 to {text.num_hidden_layers}, or "
            f"{-text.num_hidden_layers - 1} to -1 counted from the last"
        )
    known = targets[~np.isnan(targets[:, 0]), 0]
    shift, scale = (0.0, 1.0) if one.task != "regression" else _target_mean_and_std(key, known)
    settings = HeadSettings(
        name=labels.name, task=one.task, labels=list(labels.labels), type=one.type, options=_drop_nulls(one.options),
        pooling=one.pooling, layer=one.layer, token_id=_token_id(key, labels.name, one, tokenizer), shift=shift,
        scale=scale, loss=one.loss or LOSSES[one.task][0], loss_options=_drop_nulls(one.loss_options),
        class_weights=_class_weights(key, one, targets, len(labels.labels)), label_smoothing=one.label_smoothing,
        weight=one.weight,
    )  # fmt: skip
    try:
        make_head(settings, 8)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}.options={settings.options}: {one.type} does not take them: {error}") from error
    return settings


def _target_mean_and_std(key: str, known: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the training records' numbers.

    Raises:
        ValueError: all are equal.
    """
    try:
        return label_mean_and_std(known.tolist())
    except ValueError as error:
        raise ValueError(f"{key}.task=regression: {error}") from error


def _drop_nulls(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _token_id(key: str, name: str, one: HeadConfig, tokenizer: Any) -> int | None:
    """The id at which a head reads, where its pooling has one.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    token = query_token(name) if one.pooling == "query" else one.token
    if token is None:
        return None
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(
            f"{key}.token={token}: the vocabulary has no such token; add it: model.language_model.new_tokens=[{token}]"
        )
    return found


def _class_weights(key: str, one: HeadConfig, targets: np.ndarray, num_labels: int) -> list[float] | None:
    """What each label counts in the loss: a list as it was given, or by rarity.

    Balanced weights are records / (labels * records of the label); of `multilabel`, without / with the label.

    Raises:
        ValueError: the list is not as long as there are labels.
    """
    if one.class_weights is None:
        return None
    if isinstance(one.class_weights, list):
        if len(one.class_weights) != num_labels:
            raise ValueError(f"{key}.class_weights={one.class_weights}: one for each of {num_labels} labels is needed")
        return [float(weight) for weight in one.class_weights]
    known = targets[~np.isnan(targets).any(axis=1)]
    if one.task == "multilabel":
        with_label = known.sum(axis=0)
        if everywhere := np.flatnonzero(with_label == len(known)).tolist():
            raise ValueError(f"{key}.class_weights=balanced: every record has label number {everywhere[0]}")
        return ((len(known) - with_label) / with_label).tolist()
    counts = np.bincount(known[:, 0].astype(int), minlength=num_labels)
    return (len(known) / (num_labels * counts)).tolist()


def register_head_class(kind: str, key: str = "model.head.type") -> None:
    """Import `package.module:Class` and put it in the table under that name; other names are left alone.

    Raises:
        ValueError: the module or the class does not exist.
    """
    module, _, name = kind.partition(":")
    if name and kind not in HEADS:
        try:
            HEADS[kind] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{key}={kind}: {error}") from error


def with_checkpoint_scales(config: VLMPredictionConfig, start: Sequence[HeadSettings]) -> VLMPredictionConfig:
    """Freshly settled heads that go on from a checkpoint's: its scale stays, which its weights were learned for."""
    before = {one.name: one for one in start}
    config.heads = [
        asdict(replace(one, shift=before[one.name].shift, scale=before[one.name].scale)) for one in config.settings
    ]
    return config
