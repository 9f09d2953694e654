"""From a `ModelConfig` to a model and its processor: the only file that knows both the schema and the models.

`compose` reads the parts' configurations and tokenizer and settles everything about the composition, in seconds and
without weights; `build_model` then loads the weights. `load_processor` and `load_model` do the same for a checkpoint.
"""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from vlm.assembly.anyres import resolve_anyres
from vlm.assembly.encoders import check_views, encoder_sources, resolve_encoders
from vlm.assembly.family import get_auto_class, load_family_config, load_family_model
from vlm.assembly.heads import add_tokens, grow_embeddings
from vlm.assembly.quantization import make_quantization_config, quantization_config_of, quantized_parts
from vlm.config.schema import ConnectorConfig, ModelConfig
from vlm.data.encoding.labels import read_template
from vlm.families.processing import load_family_processor
from vlm.families.table import get_family
from vlm.models.configuration_prediction import VLMPredictionConfig
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.connectors import CONNECTORS, connector_options, count_tokens
from vlm.models.encoders import combine_encoders
from vlm.models.modeling_vlm import VLMForConditionalGeneration
from vlm.models.processing_vlm import VLMProcessor


def open_model(model: ModelConfig, template: str | None, image_mode: str | None) -> tuple[Any, Any]:
    """Configuration and processor of what `model` describes, composed or of a family, without weights.

    Raises:
        ValueError: parts that do not fit, or an image mode for a family, whose own processor decides.
    """
    if model.hf_name is None:
        return compose(model, template, image_mode)
    check_no_image_mode(image_mode, model.hf_name)
    config = load_family_config(
        model.hf_name, "model.hf_name", revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return config, open_family_processor(model, config.model_type, template)


def check_no_image_mode(image_mode: str | None, name: str) -> None:
    """Raise ValueError where a whole model is told how to prepare pictures."""
    if image_mode is not None:
        raise ValueError(
            f"dataset.image_mode={image_mode}: {name} prepares pictures in its own way; dataset.image_mode=null leaves "
            "it to that"
        )


def open_family_processor(model: ModelConfig, model_type: str, template: str | None) -> Any:
    """The processor of a whole model, with another template where one is named, and the run's tokens."""
    assert model.hf_name is not None
    processor = load_family_processor(
        model.hf_name, get_family(model_type), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    if template is not None:
        processor.chat_template = chat_template(template, processor.own_template, model.hf_name)
    add_tokens(model, processor.tokenizer)
    return processor


def family_recipe(model: ModelConfig, name: str, model_type: str) -> ModelConfig:
    """The `model` section of a run on a whole model, in which its parts say where they come from."""
    return replace(
        model, hf_name=name, visual_encoder=replace(model.visual_encoder, hf_name=name),
        connector=ConnectorConfig(type=model_type), language_model=replace(model.language_model, hf_name=name),
    )  # fmt: skip


def compose(model: ModelConfig, template: str | None, image_mode: str | None) -> tuple[VLMConfig, VLMProcessor]:
    """Settle the composition: configuration and processor, without weights.

    Args:
        model: the three parts.
        template: see `DatasetConfig.template`.
        image_mode: see `DatasetConfig.image_mode`.

    Raises:
        ValueError: parts that do not fit together, with the key, what was given and what is allowed.
    """
    register_connector_class(model.connector.type)
    options = connector_options(model.connector.type, model.connector.options)
    vision_configs = [_part_config(part, source) for part, source in encoder_sources(model.visual_encoder).items()]
    text_config = _part_config("language_model", model.language_model).get_text_config()
    tokenizer = _tokenizer(model)
    features, image_processors, size = resolve_encoders(model.visual_encoder, vision_configs)
    config = VLMConfig(
        **features,
        text_config=text_config,
        connector={"type": model.connector.type, "options": options},
        image_token_id=tokenizer.get_vocab()[model.image_token],
        recipe=asdict(model),
    )
    processor = VLMProcessor(
        image_processors[0],
        tokenizer,
        chat_template=chat_template(template or "tokenizer", tokenizer.chat_template, tokenizer.name_or_path),
        own_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        image_token=model.image_token,
        image_start=model.image_start_token,
        image_end=model.image_end_token,
        tokens_per_image=count_tokens(config.connector["type"], config.num_features, options),
        image_mode=image_mode or "square",
        beside=image_processors[1:],
    )
    resolve_anyres(config, processor, model.anyres, size)
    check_views(processor)
    return config, processor


def build_model(
    model: ModelConfig, config: VLMConfig, processor: VLMProcessor, dtype: torch.dtype, seed: int
) -> VLMForConditionalGeneration:
    """Load the parts' weights and compose them; embeddings grow where the tokenizer did.

    The connector's first weights depend on `seed` alone, not on what the parts drew before it.
    """
    attention = model.attn_implementation
    sources = encoder_sources(model.visual_encoder).values()
    bits = model.visual_encoder.quantization
    encoders = [
        _load_part(AutoModel, source, getattr(config, name), dtype, attention, bits)
        for source, name in zip(sources, config.encoder_names, strict=True)
    ]
    bits = model.language_model.quantization
    language_model = _load_part(AutoModelForCausalLM, model.language_model, config.text_config, dtype, attention, bits)
    grow_embeddings(language_model, processor.tokenizer)
    config.text_config = language_model.config
    config.dtype = dtype
    torch.manual_seed(seed)
    built = VLMForConditionalGeneration(config, combine_encoders(encoders), language_model)
    built.connector.to(dtype)
    if built.image_newline is not None:
        built.image_newline.to(dtype)
    built.generation_config = make_generation_config(language_model.generation_config)
    return built


def make_generation_config(given: GenerationConfig | None) -> GenerationConfig:
    """A language model's own generation settings without its taste in sampling, which every caller here chooses."""
    tokens = {} if given is None else {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id")}
    return GenerationConfig(pad_token_id=None if given is None else given.pad_token_id, **tokens)


def load_processor(checkpoint: str, template: str | None, image_mode: str | None) -> VLMProcessor:
    """The processor of a checkpoint, with another template or image mode where one is named."""
    processor = VLMProcessor.from_pretrained(checkpoint)
    if template is not None:
        processor.chat_template = chat_template(template, processor.own_template, checkpoint)
    if image_mode is not None:
        processor.image_mode = image_mode
    check_views(processor)
    return processor


def load_config(checkpoint: str, connector_type: str | None = None) -> Any:
    """The configuration of a checkpoint, of a composed model or of a family's, perhaps with prediction heads.

    Raises:
        ValueError: the folder holds another one.
    """
    if connector_type is not None:
        register_connector_class(connector_type)
    config = AutoConfig.from_pretrained(checkpoint)
    if isinstance(config, VLMConfig | VLMPredictionConfig):
        return config
    return load_family_config(checkpoint, "trainer.from_pretrained")


def load_family(model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A family's model with its weights."""
    assert model.hf_name is not None
    return load_family_model(
        model.hf_name, config, dtype=dtype, revision=model.revision, trust_remote_code=model.trust_remote_code,
        attention=choose_attention(model.attn_implementation, dtype, config, get_auto_class(config)),
        quantization_config=quantization_config_of(config, quantized_parts(model)),
    )  # fmt: skip


def load_model(
    checkpoint: str, config: VLMConfig, dtype: torch.dtype, attn_implementation: str = "auto",
    quantization: Mapping[str, str] | None = None,
) -> VLMForConditionalGeneration:  # fmt: skip
    """The model of a checkpoint; `quantization` is part -> `8bit` or `4bit`."""
    parts = {**dict.fromkeys(config.encoder_names, AutoModel), "text_config": AutoModelForCausalLM}
    attention = {
        name: choose_attention(attn_implementation, dtype, getattr(config, name), auto) for name, auto in parts.items()
    }
    return VLMForConditionalGeneration.from_pretrained(
        checkpoint, config=config, dtype=dtype, attn_implementation=attention,
        quantization_config=quantization_config_of(config, quantization or {}),
    )  # fmt: skip


def register_connector_class(kind: str) -> None:
    """Import `package.module:Class` and put it in the table under that name; other names are left alone.

    Raises:
        ValueError: the module or the class does not exist.
    """
    module, _, name = kind.partition(":")
    if name and kind not in CONNECTORS:
        try:
            CONNECTORS[kind] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model.connector.type={kind}: {error}") from error


def choose_attention(name: str, dtype: torch.dtype, config: PreTrainedConfig, auto: Any) -> str:
    """`auto` as the best implementation that is installed and that this part takes, any other name as it is."""
    if name != "auto":
        return name
    model_class = auto._model_mapping.get(type(config), None)
    half = dtype in (torch.bfloat16, torch.float16)
    if half and torch.cuda.is_available() and is_flash_attn_2_available() and model_class._supports_flash_attn:
        return "flash_attention_2"
    return "sdpa" if model_class is None or model_class._supports_sdpa else "eager"


def chat_template(name: str, own: Any, source: str) -> str:
    """The text of a template: a packaged one, a file, or the tokenizer's own.

    Args:
        name: `dataset.template`, or `tokenizer`.
        own: the template that the tokenizer brought along, if any.
        source: where the tokenizer comes from, for the message.

    Raises:
        ValueError: the tokenizer brings none.
    """
    if name != "tokenizer":
        return read_template(name)
    if not isinstance(own, str):
        raise ValueError(
            f"dataset.template=tokenizer: {source} brings no chat template. Name one, such as plain or v1."
        )
    return own


def _part_config(part: str, source: Any) -> PreTrainedConfig:
    """A part's own configuration; the vision half of a two-tower one.

    Raises:
        ValueError: nothing loads from its `hf_name`.
    """
    try:
        config = AutoConfig.from_pretrained(
            source.hf_name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.{part}.hf_name={source.hf_name}: no model configuration there (a Hub name or a local folder with a "
            f"config.json is needed): {str(error).splitlines()[0]}"
        ) from error
    if config.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model.{part}.hf_name={source.hf_name}: transformers itself does not know model_type={config.model_type}, "
            "so a checkpoint with this part could not be loaded again"
        )
    return config.vision_config if part != "language_model" and hasattr(config, "vision_config") else config


def _tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, with the image tokens that it lacks and a padding token.

    Raises:
        ValueError: there is none beside the language model.
    """
    source = model.language_model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.hf_name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.language_model.hf_name={source.hf_name}: no tokenizer loads from there: "
            f"{str(error).splitlines()[0]}"
        ) from error
    requested = [model.image_token, model.image_start_token, model.image_end_token]
    known = tokenizer.get_vocab()
    new = [token for token in requested if token is not None and token not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    add_tokens(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _load_part(
    auto: Any, source: Any, config: PreTrainedConfig, dtype: torch.dtype, attention: str, bits: str | None
) -> Any:  # fmt: skip
    """One part's weights. A folder that holds less than the part is an error, not a random initialisation."""
    part, info = auto.from_pretrained(
        source.hf_name,
        config=config,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        dtype=dtype,
        attn_implementation=choose_attention(attention, dtype, config, auto),
        quantization_config=None if bits is None else make_quantization_config(bits),
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source.hf_name} lacks {len(missing)} of the weights that {type(part).__name__} needs: {missing[:5]}"
        )
    return part


def recipe_differences(config: VLMConfig, model: ModelConfig, overridden_keys: list[str]) -> list[tuple[str, Any, Any]]:
    """Where `model` contradicts a checkpoint under the touched keys: (key, wanted, the checkpoint's)."""
    recorded, requested = _flatten(asdict(ModelConfig())) | _flatten(config.recipe), _flatten(asdict(model))
    return [
        (f"model.{key}", requested[key], recorded.get(key))
        for key in requested
        if any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden_keys)
        and requested[key] != recorded.get(key)
        and key not in ("attn_implementation", "connector.name")
        and not key.endswith(".quantization")
        and not key.startswith(("anyres.", "head."))
        and key != "language_model.new_tokens"
        and not (requested[key] is None and key.startswith("connector.options."))
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
