"""Makes the settings of a checkpoint's prediction heads from the `head` section, and adds the heads' tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import cast

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vlm.assembly.opening import quiet_loading
from vlm.config.choices import LOSSES
from vlm.config.derived import extra_tokens, head_key, query_token, query_tokens
from vlm.config.model_schema import HeadConfig, ModelConfig
from vlm.config.named import import_named
from vlm.data.encoding.labels import get_media_token_ids
from vlm.data.heads.labels import HeadLabels, label_mean_and_std
from vlm.data.processor import Processor
from vlm.models.configuration_prediction import HeadSettings, VLMPredictionConfig
from vlm.models.heads import HEADS, PredictionHead
from vlm.models.vocabulary import resize_vocabulary


def add_tokens(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a run's new tokens to a tokenizer, which then recognises them everywhere."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in extra_tokens(model) if token not in known])


def new_token_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens whose embeddings a run trains."""
    return cast("list[int]", tokenizer.convert_tokens_to_ids(extra_tokens(model)))


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model's embeddings a row for each token; new rows are drawn around the mean of the others."""
    grow_rows(model, len(tokenizer), multiple=64)


def grow_rows(model: PreTrainedModel, rows: int, multiple: int | None = None) -> None:
    """Give a model's embeddings and vocabulary head at least this many rows, or a multiple of a number if given."""
    if rows > get_num_embeddings(model):
        with quiet_loading():  # transformers tells how it draws the new rows
            resize_vocabulary(model, rows, multiple)


def get_num_embeddings(model: PreTrainedModel) -> int:
    """Return how many rows a model's embeddings have."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings())  # declared as a module of any kind
    return embeddings.num_embeddings


def suffix_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that follow every prompt: the tokens at which heads read."""
    return tuple(cast("list[int]", tokenizer.convert_tokens_to_ids(query_tokens(model.head))))


def resolve_heads(
    model: ModelConfig,
    body_config: PreTrainedConfig,
    processor: Processor,
    labels: Sequence[HeadLabels],
    targets: Mapping[str, np.ndarray],
) -> VLMPredictionConfig:
    """Return the configuration of a model with a run's heads on the model of `body_config`.

    `targets` has the targets of the training records for each head, `(N, width)`, NaN if a record has none.
    """
    text, tokenizer = body_config.get_text_config(), processor.tokenizer
    heads = []
    for head_labels, head in zip(labels, model.head.by_name.values(), strict=True):
        key, head_targets = head_key(model.head, head_labels.name), targets[head_labels.name]
        heads.append(asdict(_make_head_settings(key, head, head_labels, head_targets, tokenizer, text)))
    return VLMPredictionConfig(
        body_config=body_config,
        heads=heads,
        media_token_ids=get_media_token_ids(processor),
        suffix="".join(query_tokens(model.head)),
        suffix_ids=suffix_ids(model, tokenizer),
        generation_weight=model.head.generation_weight,
        recipe=asdict(model),
        hidden_size=text.hidden_size,  # asked for by DeepSpeed's integration
    )


def resolve_vector_head(model: ModelConfig, body_config: PreTrainedConfig, processor: Processor) -> VLMPredictionConfig:
    """Return the configuration of a model with a run's embedding head.

    Raises:
        ValueError: the head does not fit this language model.
    """
    head, width = model.head, model.head.dim or body_config.get_text_config().hidden_size
    if wrong := [size for size in head.loss_options.get("widths") or [] if size > width]:
        raise ValueError(f"model.head.loss_options.widths: {wrong} are larger than the width of vectors, {width}")
    no_targets = {head.name: np.empty((0, 1))}
    return resolve_heads(model, body_config, processor, [HeadLabels(head.name, str(head.task))], no_targets)


def _make_head_settings(
    key: str,
    head: HeadConfig,
    labels: HeadLabels,
    targets: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    text: PreTrainedConfig,
) -> HeadSettings:
    """Return the settings of one head; `key` is its place in the configuration."""
    assert head.task is not None
    if hasattr(nn.ModuleDict(), labels.name):
        raise ValueError(f"{key}: torch modules already have an attribute {labels.name}; choose another name")
    register_head_class(head.type, f"{key}.type")
    if head.layer is not None and not -text.num_hidden_layers - 1 <= head.layer <= text.num_hidden_layers:
        raise ValueError(
            f"{key}.layer={head.layer}: the language model has hidden states 0 to {text.num_hidden_layers}, or "
            f"{-text.num_hidden_layers - 1} to -1 counted from the last"
        )
    shift, scale = _target_mean_and_std(key, targets[:, 0]) if head.task == "regression" else (0.0, 1.0)
    settings = HeadSettings(
        name=labels.name, task=head.task, labels=list(labels.labels), type=head.type, options=_drop_nulls(head.options),
        pooling=head.pooling, layer=head.layer, token_id=_token_id(key, labels.name, head, tokenizer), shift=shift,
        scale=scale, loss=head.loss or LOSSES[head.task][0], loss_options=_drop_nulls(head.loss_options),
        class_weights=_class_weights(key, head, targets, len(labels.labels)), label_smoothing=head.label_smoothing,
        weight=head.weight, dim=head.dim, prompts={side: str(text) for side, text in head.prompts.items() if text},
    )  # fmt: skip
    try:
        PredictionHead(8, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}.options={settings.options}: {head.type} does not take them: {error}") from error
    return settings


def _target_mean_and_std(key: str, targets: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the training records' numbers, which are not all equal."""
    try:
        return label_mean_and_std(targets[~np.isnan(targets)].tolist())
    except ValueError as error:
        raise ValueError(f"{key}.task=regression: {error}") from error


def _drop_nulls(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _token_id(key: str, name: str, head: HeadConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token at which a head reads; None if its pooling reads at no token."""
    token = query_token(name) if head.pooling == "query" else head.token
    if token is None:
        return None
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"{key}.token={token}: the vocabulary has no such token; add it: model.language_model.new_tokens=[{token}]"
        )
    return token_id


def _class_weights(key: str, head: HeadConfig, targets: np.ndarray, num_labels: int) -> list[float] | None:
    """Return the weight of each label in the loss: the list of the configuration, or computed from frequencies.

    Balanced weights are records / (labels * records with the label), for `multilabel` records without / with the label.
    """
    if head.class_weights is None:
        return None
    if isinstance(head.class_weights, list):
        if len(head.class_weights) != num_labels:
            raise ValueError(f"{key}.class_weights={head.class_weights}: one for each of {num_labels} labels is needed")
        return [float(weight) for weight in head.class_weights]
    known = targets[~np.isnan(targets).any(axis=1)]
    if head.task == "multilabel":
        with_label = known.sum(axis=0)
        if everywhere := np.flatnonzero(with_label == len(known)).tolist():
            raise ValueError(
                f"{key}.class_weights=balanced: every record has the label number {everywhere[0]}, so its weight is "
                "undefined"
            )
        return ((len(known) - with_label) / with_label).tolist()
    counts = np.bincount(known[:, 0].astype(int), minlength=num_labels)
    return (len(known) / (num_labels * counts)).tolist()


def register_head_class(kind: str, key: str = "model.head.type") -> None:
    """Import `package.module:Class` and put the class in the table under that name; other names stay as they are."""
    if ":" in kind and kind not in HEADS:
        HEADS[kind] = import_named(kind, key)  # pyright: ignore[reportArgumentType] - the user's class


def with_checkpoint_scales(config: VLMPredictionConfig, start: Sequence[HeadSettings]) -> VLMPredictionConfig:
    """Return the configuration of resolved heads with the scales of the checkpoint, with which it was trained."""
    scales = {head.name: {"shift": head.shift, "scale": head.scale} for head in start}
    config.heads = [asdict(head) | scales[head.name] for head in config.settings]
    return config
