"""The model of a run: its configuration and processor first, without weights; then the weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vlm.assembly.adapter_folder import is_adapter_checkpoint
from vlm.assembly.anyres import resolve_anyres
from vlm.assembly.checkpoint import Checkpoint, CheckpointKind, open_checkpoint
from vlm.assembly.checkpoint_heads import resolve_checkpoint_heads
from vlm.assembly.compose import build_model, compose, recipe_differences, register_connector_class
from vlm.assembly.encoders import image_size
from vlm.assembly.family import load_family_config
from vlm.assembly.heads import add_tokens, grow_embeddings
from vlm.assembly.image_budget import limit_image_tokens
from vlm.assembly.language_models import set_balance_loss
from vlm.assembly.model_kinds import is_composed_config, is_prediction_config
from vlm.assembly.opening import opening
from vlm.assembly.processor_options import apply_processor_options, check_no_processor_options
from vlm.assembly.quantization import quantized_parts
from vlm.checks.embeddings import problems_of_any_head
from vlm.checks.model import check_no_image_mode
from vlm.config.model_schema import ConnectorConfig
from vlm.config.recorded import read_recipe
from vlm.config.schema import RunConfig
from vlm.data.coordinates.table import use_convention
from vlm.data.processor import Processor
from vlm.families.processing import FamilyProcessor
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.heads import head_class


def resolve_model(config: RunConfig, overrides: Sequence[str] = ()) -> tuple[PreTrainedConfig, Processor]:
    """Return configuration and processor of a run's model, from parts or from a checkpoint, without weights.

    With `trainer.from_pretrained`, `config.model` becomes the checkpoint's recipe. The run keeps its own head, unless
    the checkpoint has heads, which it then trains further.

    Args:
        config: the run's configuration.
        overrides: the keys that the command line sets.

    Raises:
        ValueError: the parts do not fit, or the command line contradicts the checkpoint.
    """
    model_config, processor = _resolve_model(config, overrides)
    if config.dataset.max_image_tokens is not None:
        name = config.trainer.from_pretrained
        adapter = name if name and is_adapter_checkpoint(name) else None
        limit_image_tokens(processor, model_config, config.dataset.max_image_tokens, adapter)
    if config.dataset.alpha_background is not None:
        processor.alpha_background = config.dataset.alpha_background
    use_convention(processor, config.dataset.coordinates, model_config.model_type)
    return model_config, processor


def _resolve_model(config: RunConfig, overrides: Sequence[str]) -> tuple[PreTrainedConfig, Processor]:
    """Resolve a model without the settings of `dataset` for pixels and coordinates, which `resolve_model` applies."""
    overridden_keys = [key.removeprefix("model.") for key in overrides if key.startswith("model.")]
    model, name = config.model, config.trainer.from_pretrained
    if name and model.hf_name is not None and {"model", "model.hf_name", "model.revision"} & set(overrides):
        raise ValueError(
            f"trainer.from_pretrained={name} and model.hf_name={model.hf_name}: both name the model to start from; "
            "choose one"
        )
    if name and {"connector", "connector.type"} & set(overridden_keys):
        register_connector_class(model.connector.type)
    if not name and model.hf_name is not None:  # before anything is fetched
        check_no_part_overrides(overridden_keys, f"model.hf_name={model.hf_name}")
        check_no_image_mode(config.dataset.image_mode, model.hf_name)
    checkpoint = _open_start(config)
    if checkpoint is None:
        check_no_processor_options(model.processor)
        return compose(model, config.dataset.template, config.dataset.image_mode)
    if checkpoint.has_heads:
        _resolve_heads(config, checkpoint, overridden_keys)
    if is_composed_config(checkpoint.body_config):
        return _resolve_composed(config, checkpoint, checkpoint.body_config, overridden_keys)
    return _resolve_family(config, checkpoint, overridden_keys)


def _open_start(config: RunConfig) -> Checkpoint | None:
    """Return the checkpoint that a run begins with; None if it composes its model from parts."""
    model, name = config.model, config.trainer.from_pretrained
    if name:
        checkpoint = open_checkpoint(name, key="trainer.from_pretrained")
        if is_composed_config(checkpoint.body_config):
            return checkpoint
        return replace(checkpoint, trust_remote_code=model.trust_remote_code)  # the key is for whole models
    if model.hf_name is None:
        return None
    family_config = load_family_config(
        model.hf_name, "model.hf_name", revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return Checkpoint(
        model.hf_name, CheckpointKind.FAMILY, family_config, model.revision, trust_remote_code=model.trust_remote_code
    )


def _resolve_heads(config: RunConfig, checkpoint: Checkpoint, overridden_keys: Sequence[str]) -> None:
    """Make the heads of a checkpoint those of the run.

    A class that only the checkpoint names is refused: code is imported only if the run names it.
    """
    assert is_prediction_config(checkpoint.config)
    head_keys = [key.removeprefix("head.") for key in overridden_keys]
    named_types = {head.type for head in config.model.head.by_name.values()}
    config.model.head = resolve_checkpoint_heads(config.model.head, checkpoint.config, checkpoint.name, head_keys)
    for head in config.model.head.by_name.values():
        if head.type not in named_types:
            head_class(head.type)
    for problem in problems_of_any_head(config):
        raise ValueError(problem)
    for part, kind in quantized_parts(config.model).items():
        raise ValueError(
            f"model.{part}.quantization={kind}: trainer.from_pretrained={checkpoint.name} has prediction heads; such a "
            "checkpoint is loaded as it is"
        )


def _resolve_family(
    config: RunConfig, checkpoint: Checkpoint, overridden_keys: Sequence[str]
) -> tuple[PreTrainedConfig, Processor]:
    """Resolve a whole model; the parts of `config.model` then name their sources."""
    key = "trainer.from_pretrained" if config.trainer.from_pretrained else "model.hf_name"
    check_no_part_overrides(overridden_keys, f"{key}={checkpoint.name}")
    processor = checkpoint.load_processor(config.dataset.template, config.dataset.image_mode)
    assert isinstance(processor, FamilyProcessor)
    model, name = config.model, checkpoint.name
    changes = apply_processor_options(processor, checkpoint.body_config, model.processor)
    if changes and checkpoint.kind is CheckpointKind.ADAPTER:
        raise ValueError(
            f"model.processor.{changes[0]}: {name} is an adapter, which keeps the image settings of its base; merge "
            "it first (vlm merge-lora)"
        )
    add_tokens(model, processor.tokenizer)
    config.model = replace(
        model,
        hf_name=name,
        revision=checkpoint.revision,
        visual_encoder=replace(model.visual_encoder, hf_name=name),
        connector=ConnectorConfig(type=checkpoint.body_config.model_type),
        language_model=replace(model.language_model, hf_name=name),
    )
    return checkpoint.body_config, processor


def _resolve_composed(
    config: RunConfig, checkpoint: Checkpoint, model_config: VLMConfig, overridden_keys: Sequence[str]
) -> tuple[VLMConfig, Processor]:
    """Resolve a composed model; `config.model` becomes its recipe with the run's allowed changes."""
    name, requested = checkpoint.name, config.model
    check_no_processor_options(requested.processor)
    with opening(name, "the recipe in its config.json"):
        recorded_recipe = read_recipe(model_config.recipe)
        differences = recipe_differences(model_config, requested, overridden_keys)
    if differences:
        asked = "; ".join(
            f"{key}={value!r}, but the checkpoint has {recorded!r}" for key, value, recorded in differences
        )
        raise ValueError(f"trainer.from_pretrained={name}: its architecture is fixed. You asked for {asked}")
    processor = checkpoint.load_composed_processor(config.dataset.template, config.dataset.image_mode)
    if checkpoint.kind is CheckpointKind.ADAPTER and requested.anyres.grids is not None:
        raise ValueError(
            f"model.anyres.grids: {name} is an adapter, which keeps the image settings of its base; merge it first, "
            "or leave model.anyres.grids=null"
        )
    resolve_anyres(model_config, processor, requested.anyres, image_size(processor.image_processor))
    add_tokens(requested, processor.tokenizer)
    config.model = recorded_recipe
    config.model.attn_implementation, config.model.head = requested.attn_implementation, requested.head
    config.model.language_model.new_tokens = requested.language_model.new_tokens
    if (coefficient := requested.language_model.balance_loss) is not None:
        set_balance_loss(model_config.text_config, coefficient, f"trainer.from_pretrained={name}")
        config.model.language_model.balance_loss = coefficient
    for part, kind in quantized_parts(requested).items():
        getattr(config.model, part).quantization = kind
    return model_config, processor


def check_no_part_overrides(overridden_keys: Sequence[str], whole: str) -> None:
    """Refuse keys of the command line that would change a part of a whole model."""
    allowed_keys = (
        "hf_name", "revision", "trust_remote_code", "unproved", "attn_implementation", "visual_encoder.quantization",
        "language_model.quantization", "connector.name", "language_model.new_tokens", "head", "processor",
    )  # fmt: skip
    free = ("head.", "processor.")
    if fixed := [key for key in overridden_keys if key not in allowed_keys and not key.startswith(free)]:
        raise ValueError(f"{whole} is a whole model: its parts are fixed. You asked for model.{fixed[0]}")


def load_weights(
    config: RunConfig, model_config: PreTrainedConfig, processor: Processor, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Return the model of a run that `resolve_model` resolved, with its weights and an embedding row for each token.

    `dtype` is the precision under DeepSpeed; without DeepSpeed, weights are float32 until `cast` converts frozen parts.
    The initial weights of a new connector are drawn with `seed`.
    """
    dtype = dtype if config.trainer.deepspeed else torch.float32
    checkpoint = _open_start(config)
    if checkpoint is None:
        assert is_composed_config(model_config)
        model = build_model(config.model, model_config, processor, dtype, seed)
    else:
        if checkpoint.kind in (CheckpointKind.COMPOSED, CheckpointKind.FAMILY):
            checkpoint = replace(checkpoint, config=model_config)  # which the run may have given tiles
        elif is_prediction_config(checkpoint.config):
            checkpoint.config.body_config = model_config
        quantization = {} if checkpoint.kind is CheckpointKind.ADAPTER else quantized_parts(config.model)
        model = checkpoint.load_model(dtype, config.model.attn_implementation, quantization=quantization)
    grow_embeddings(model, processor.tokenizer)
    return model
