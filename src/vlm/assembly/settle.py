"""The model of a run: its configuration and processor first, without weights; then the weights."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import torch

from vlm.assembly.adapter_folder import is_adapter_checkpoint
from vlm.assembly.adapter_folder import load as load_on_base
from vlm.assembly.anyres import resolve_anyres
from vlm.assembly.compose import (
    build_model,
    check_no_image_mode,
    family_recipe,
    load_config,
    load_family,
    load_model,
    load_processor,
    open_family_processor,
    open_model,
    recipe_differences,
)
from vlm.assembly.encoders import image_size
from vlm.assembly.heads import add_tokens, grow_embeddings
from vlm.assembly.quantization import quantized_parts
from vlm.checks.heads import head_problems
from vlm.config.schema import HeadConfig, HeadsConfig, ModelConfig, RunConfig, from_mapping
from vlm.models import VLMConfig, VLMForPrediction, VLMPredictionConfig


def resolve_model(config: RunConfig, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """Configuration and processor of the model, from parts or from a checkpoint, without weights.

    With `trainer.from_pretrained`, `config.model` becomes what the checkpoint was built with; a head that the run asks
    for stays, and where the checkpoint has heads they are what the run goes on with.

    Raises:
        ValueError: the parts do not fit, or the command line contradicts the checkpoint.
    """
    checkpoint = config.trainer.from_pretrained
    template, image_mode = config.dataset.template, config.dataset.image_mode
    overridden_keys = [key.removeprefix("model.") for key in overrides if key.startswith("model.")]
    if not checkpoint:
        if config.model.hf_name is not None:
            check_no_part_overrides(overridden_keys, f"model.hf_name={config.model.hf_name}")
        found = open_model(config.model, template, image_mode)
        if config.model.hf_name is not None:
            config.model = family_recipe(config.model, config.model.hf_name, found[0].model_type)
        return found
    if config.model.hf_name is not None and {"model", "model.hf_name", "model.revision"} & set(overrides):
        raise ValueError(
            f"trainer.from_pretrained={checkpoint} and model.hf_name={config.model.hf_name}: both say what to begin "
            "with; choose one"
        )
    named = (
        config.model.connector.type if "connector" in overridden_keys or "connector.type" in overridden_keys else None
    )
    model_config = load_config(checkpoint, named)
    if isinstance(model_config, VLMPredictionConfig):
        overridden_head_keys = [key.removeprefix("head.") for key in overridden_keys]
        config.model.head = resolve_checkpoint_heads(config.model.head, model_config, checkpoint, overridden_head_keys)
        for problem in head_problems(config):
            raise ValueError(problem)
        for part, kind in quantized_parts(config.model).items():
            raise ValueError(
                f"model.{part}.quantization={kind}: trainer.from_pretrained={checkpoint} has prediction heads; such a "
                "checkpoint is loaded as it is"
            )
        model_config = model_config.body_config
    if not isinstance(model_config, VLMConfig):
        check_no_part_overrides(overridden_keys, f"trainer.from_pretrained={checkpoint}")
        config.model = family_recipe(replace(config.model, revision=None), checkpoint, model_config.model_type)
        check_no_image_mode(image_mode, checkpoint)
        return model_config, open_family_processor(config.model, model_config.model_type, template)
    if different := recipe_differences(model_config, config.model, overridden_keys):
        said = "; ".join(
            f"{key}={requested!r}, but the checkpoint has {recorded_value!r}"
            for key, requested, recorded_value in different
        )
        raise ValueError(f"trainer.from_pretrained={checkpoint}: its architecture is fixed. You asked for {said}")
    processor = load_processor(checkpoint, template, image_mode)
    if is_adapter_checkpoint(checkpoint) and config.model.anyres.grids is not None:
        raise ValueError(
            f"model.anyres.grids: {checkpoint} is an adapter on its base, which keeps how it sees pictures; merge them "
            "first, or leave model.anyres.grids=null"
        )
    resolve_anyres(model_config, processor, config.model.anyres, image_size(processor.image_processor))
    add_tokens(config.model, processor.tokenizer)
    requested_model, quantised = config.model, quantized_parts(config.model)
    config.model = from_mapping(ModelConfig, model_config.recipe)
    config.model.attn_implementation, config.model.head = requested_model.attn_implementation, requested_model.head
    config.model.language_model.new_tokens = requested_model.language_model.new_tokens
    for part, kind in quantised.items():
        getattr(config.model, part).quantization = kind
    return model_config, processor


def check_no_part_overrides(overridden_keys: Sequence[str], whole: str) -> None:
    """Refuse keys of the command line that would change a part of a whole model.

    Raises:
        ValueError: there is one.
    """
    allowed_keys = ("hf_name", "revision", "trust_remote_code", "attn_implementation", "visual_encoder.quantization",
            "language_model.quantization", "connector.name", "language_model.new_tokens", "head")  # fmt: skip
    if fixed := [key for key in overridden_keys if key not in allowed_keys and not key.startswith("head.")]:
        raise ValueError(f"{whole} is a whole model: its parts are fixed. You asked for model.{fixed[0]}")


CHANGEABLE_HEAD_KEYS = (
    "loss",
    "loss_options",
    "class_weights",
    "label_smoothing",
    "weight",
    "threshold_by",
    "generation_weight",
)
"""Keys of a head that its weights do not depend on."""


def resolve_checkpoint_heads(
    requested: HeadsConfig, config: VLMPredictionConfig, checkpoint: str, overridden_keys: Sequence[str]
) -> HeadsConfig:
    """The heads that a run goes on with: a checkpoint's, trained as the run says.

    Args:
        requested: the run's.
        config: the checkpoint's.
        checkpoint: where it is.
        overridden_keys: keys that the command line sets, below `head`.

    Raises:
        ValueError: the run asks for none, or for others.
    """
    if requested.task is None:
        raise ValueError(
            f"trainer.from_pretrained={checkpoint}: it has prediction heads; choose a run with one, such as head-binary"
        )
    recorded: HeadsConfig = from_mapping(ModelConfig, config.recipe).head
    labels = {one.name: one.labels or None for one in config.settings}
    requested_model = {"": (requested, recorded)} | {
        f"beside.{name}.": (one, recorded.beside.get(name)) for name, one in requested.beside.items()
    }
    for path, (one, recorded_value) in requested_model.items():
        if recorded_value is None:
            raise _fixed_heads_error(checkpoint, path[:-1], one.task, f"only {', '.join(labels)}")
        for field in fields(one):
            key = f"{path}{field.name}"
            if field.name in (*CHANGEABLE_HEAD_KEYS, "beside") or not (
                key in overridden_keys or _differs_from_default(one, field)
            ):
                continue
            value, allowed = getattr(one, field.name), [getattr(recorded_value, field.name)]
            if field.name == "labels":
                allowed.append(labels[recorded.name if recorded_value is recorded else path.split(".")[1]])
            if _without_nulls(value) not in map(_without_nulls, allowed):
                raise _fixed_heads_error(checkpoint, key, value, allowed[-1])
    beside = {
        name: replace(
            recorded_value,
            labels=labels[name],
            **_changeable_options(requested.beside.get(name, recorded_value), recorded_value),
        )
        for name, recorded_value in recorded.beside.items()
    }
    return replace(recorded, labels=labels[recorded.name], beside=beside, **_changeable_options(requested, recorded))


def _fixed_heads_error(checkpoint: str, key: str, requested: Any, recorded_value: Any) -> ValueError:
    return ValueError(
        f"trainer.from_pretrained={checkpoint}: its heads are fixed. You asked for model.head.{key}={requested}, but it "
        f"has {recorded_value}"
    )


def _changeable_options(one: HeadConfig, recorded_value: HeadConfig) -> dict[str, Any]:
    """What a run may say anew of a head that there is."""
    return {
        field.name: getattr(one, field.name) for field in fields(recorded_value) if field.name in CHANGEABLE_HEAD_KEYS
    }


def _differs_from_default(one: HeadConfig, field: Field[Any]) -> bool:
    """Whether a key has another value than its default."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return _without_nulls(getattr(one, field.name)) != default


def _without_nulls(value: Any) -> Any:
    """Options without those that are left at a class's own default; other values as they are."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def load_weights(config: RunConfig, model_config: Any, processor: Any, dtype: torch.dtype, seed: int) -> Any:
    """The model with its weights, and a row for each token. Without DeepSpeed, parts that train are in float32."""
    model = _load_model(config, model_config, processor, dtype if config.trainer.deepspeed else torch.float32, seed)
    grow_embeddings(model, processor.tokenizer)
    return model


def _load_model(config: RunConfig, model_config: Any, processor: Any, dtype: torch.dtype, seed: int) -> Any:
    checkpoint, attention = config.trainer.from_pretrained, config.model.attn_implementation
    if checkpoint and is_adapter_checkpoint(checkpoint):
        return load_on_base(checkpoint, dtype=dtype, attn_implementation=attention)
    if checkpoint and isinstance(load_config(checkpoint), VLMPredictionConfig):
        return VLMForPrediction.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=None if attention == "auto" else attention
        )
    if not isinstance(model_config, VLMConfig):
        return load_family(config.model, model_config, dtype)
    if checkpoint:
        return load_model(checkpoint, model_config, dtype, attention, quantized_parts(config.model))
    return build_model(config.model, model_config, processor, dtype, seed)
