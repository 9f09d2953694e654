"""The model of a run: its configuration and processor first, without weights; then the weights."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import torch

from vlm.assembly.adapter_folder import is_on_base
from vlm.assembly.adapter_folder import load as load_on_base
from vlm.assembly.anyres import settle_anyres
from vlm.assembly.compose import (
    build_model,
    family_recipe,
    load_config,
    load_family,
    load_model,
    load_processor,
    open_family_processor,
    open_model,
    recipe_differences,
    refuse_image_mode,
)
from vlm.assembly.encoders import image_size
from vlm.assembly.heads import add_tokens, grow_embeddings
from vlm.assembly.quantization import kinds_of
from vlm.checks.heads import head_problems
from vlm.config.schema import HeadConfig, HeadsConfig, ModelConfig, RunConfig, from_mapping
from vlm.models import VLMConfig, VLMForPrediction, VLMPredictionConfig


def settle_model(config: RunConfig, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """Configuration and processor of the model, from parts or from a checkpoint, without weights.

    With `trainer.from_pretrained`, `config.model` becomes what the checkpoint was built with; a head that the run asks
    for stays, and where the checkpoint has heads they are what the run goes on with.

    Raises:
        ValueError: the parts do not fit, or the command line contradicts the checkpoint.
    """
    checkpoint = config.trainer.from_pretrained
    template, image_mode = config.dataset.template, config.dataset.image_mode
    touched = [key.removeprefix("model.") for key in overrides if key.startswith("model.")]
    if not checkpoint:
        if config.model.hf_name is not None:
            refuse_parts(touched, f"model.hf_name={config.model.hf_name}")
        found = open_model(config.model, template, image_mode)
        if config.model.hf_name is not None:
            config.model = family_recipe(config.model, config.model.hf_name, found[0].model_type)
        return found
    if config.model.hf_name is not None and {"model", "model.hf_name", "model.revision"} & set(overrides):
        raise ValueError(
            f"trainer.from_pretrained={checkpoint} and model.hf_name={config.model.hf_name}: both say what to begin "
            "with; choose one"
        )
    named = config.model.connector.type if "connector" in touched or "connector.type" in touched else None
    model_config = load_config(checkpoint, named)
    if isinstance(model_config, VLMPredictionConfig):
        below = [key.removeprefix("head.") for key in touched]
        config.model.head = heads_of_checkpoint(config.model.head, model_config, checkpoint, below)
        for problem in head_problems(config):
            raise ValueError(problem)
        for part, kind in kinds_of(config.model).items():
            raise ValueError(
                f"model.{part}.quantization={kind}: trainer.from_pretrained={checkpoint} has prediction heads; such a "
                "checkpoint is loaded as it is"
            )
        model_config = model_config.body_config
    if not isinstance(model_config, VLMConfig):
        refuse_parts(touched, f"trainer.from_pretrained={checkpoint}")
        config.model = family_recipe(replace(config.model, revision=None), checkpoint, model_config.model_type)
        refuse_image_mode(image_mode, checkpoint)
        return model_config, open_family_processor(config.model, model_config.model_type, template)
    if different := recipe_differences(model_config, config.model, touched):
        said = "; ".join(f"{key}={wanted!r}, but the checkpoint has {has!r}" for key, wanted, has in different)
        raise ValueError(f"trainer.from_pretrained={checkpoint}: its architecture is fixed. You asked for {said}")
    processor = load_processor(checkpoint, template, image_mode)
    if is_on_base(checkpoint) and config.model.anyres.grids is not None:
        raise ValueError(
            f"model.anyres.grids: {checkpoint} is an adapter on its base, which keeps how it sees pictures; merge them "
            "first, or leave model.anyres.grids=null"
        )
    settle_anyres(model_config, processor, config.model.anyres, image_size(processor.image_processor))
    add_tokens(config.model, processor.tokenizer)
    asked, quantised = config.model, kinds_of(config.model)
    config.model = from_mapping(ModelConfig, model_config.recipe)
    config.model.attn_implementation, config.model.head = asked.attn_implementation, asked.head
    config.model.language_model.new_tokens = asked.language_model.new_tokens
    for part, kind in quantised.items():
        getattr(config.model, part).quantization = kind
    return model_config, processor


def refuse_parts(touched: Sequence[str], whole: str) -> None:
    """Refuse keys of the command line that would change a part of a whole model.

    Raises:
        ValueError: there is one.
    """
    free = ("hf_name", "revision", "trust_remote_code", "attn_implementation", "visual_encoder.quantization",
            "language_model.quantization", "connector.name", "language_model.new_tokens", "head")  # fmt: skip
    if fixed := [key for key in touched if key not in free and not key.startswith("head.")]:
        raise ValueError(f"{whole} is a whole model: its parts are fixed. You asked for model.{fixed[0]}")


FREE = ("loss", "loss_options", "class_weights", "label_smoothing", "weight", "threshold_by", "generation_weight")
"""Keys of a head that its weights do not depend on."""


def heads_of_checkpoint(
    wanted: HeadsConfig, config: VLMPredictionConfig, checkpoint: str, touched: Sequence[str]
) -> HeadsConfig:
    """The heads that a run goes on with: a checkpoint's, trained as the run says.

    Args:
        wanted: the run's.
        config: the checkpoint's.
        checkpoint: where it is.
        touched: keys that the command line sets, below `head`.

    Raises:
        ValueError: the run asks for none, or for others.
    """
    if wanted.task is None:
        raise ValueError(
            f"trainer.from_pretrained={checkpoint}: it has prediction heads; choose a run with one, such as head-binary"
        )
    recorded: HeadsConfig = from_mapping(ModelConfig, config.recipe).head
    labels = {one.name: one.labels or None for one in config.settings}
    asked = {"": (wanted, recorded)} | {
        f"beside.{name}.": (one, recorded.beside.get(name)) for name, one in wanted.beside.items()
    }
    for path, (one, has) in asked.items():
        if has is None:
            raise _fixed_heads(checkpoint, path[:-1], one.task, f"only {', '.join(labels)}")
        for own in fields(one):
            key = f"{path}{own.name}"
            if own.name in (*FREE, "beside") or not (key in touched or _is_given(one, own)):
                continue
            value, allowed = getattr(one, own.name), [getattr(has, own.name)]
            if own.name == "labels":
                allowed.append(labels[recorded.name if has is recorded else path.split(".")[1]])
            if _without_nulls(value) not in map(_without_nulls, allowed):
                raise _fixed_heads(checkpoint, key, value, allowed[-1])
    beside = {
        name: replace(has, labels=labels[name], **_free(wanted.beside.get(name, has), has))
        for name, has in recorded.beside.items()
    }
    return replace(recorded, labels=labels[recorded.name], beside=beside, **_free(wanted, recorded))


def _fixed_heads(checkpoint: str, key: str, wanted: Any, has: Any) -> ValueError:
    return ValueError(
        f"trainer.from_pretrained={checkpoint}: its heads are fixed. You asked for model.head.{key}={wanted}, but it "
        f"has {has}"
    )


def _free(one: HeadConfig, has: HeadConfig) -> dict[str, Any]:
    """What a run may say anew of a head that there is."""
    return {own.name: getattr(one, own.name) for own in fields(has) if own.name in FREE}


def _is_given(one: HeadConfig, own: Field[Any]) -> bool:
    """Whether a key has another value than its default."""
    default = own.default if own.default_factory is MISSING else own.default_factory()
    return _without_nulls(getattr(one, own.name)) != default


def _without_nulls(value: Any) -> Any:
    """Options without those that are left at a class's own default; other values as they are."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def load_weights(config: RunConfig, model_config: Any, processor: Any, dtype: torch.dtype, seed: int) -> Any:
    """The model with its weights, and a row for each token. Without DeepSpeed, parts that train are in float32."""
    model = _loaded(config, model_config, processor, dtype if config.trainer.deepspeed else torch.float32, seed)
    grow_embeddings(model, processor.tokenizer)
    return model


def _loaded(config: RunConfig, model_config: Any, processor: Any, dtype: torch.dtype, seed: int) -> Any:
    checkpoint, attention = config.trainer.from_pretrained, config.model.attn_implementation
    if checkpoint and is_on_base(checkpoint):
        return load_on_base(checkpoint, dtype=dtype, attn_implementation=attention)
    if checkpoint and isinstance(load_config(checkpoint), VLMPredictionConfig):
        return VLMForPrediction.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=None if attention == "auto" else attention
        )
    if not isinstance(model_config, VLMConfig):
        return load_family(config.model, model_config, dtype)
    if checkpoint:
        return load_model(checkpoint, model_config, dtype, attention, kinds_of(config.model))
    return build_model(config.model, model_config, processor, dtype, seed)
