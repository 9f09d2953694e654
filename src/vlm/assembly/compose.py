"""Composes a model of parts, and its processor, from a `ModelConfig`.

`compose` reads the parts' configurations and tokenizer and returns the model's configuration and processor, in seconds
and without weights; `build_model` then loads the weights.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import is_flash_attn_2_available

from vlm.assembly.anyres import resolve_anyres
from vlm.assembly.encoders import check_is_encoder, check_views, encoder_sources, image_size, resolve_encoders
from vlm.assembly.family import read_config
from vlm.assembly.heads import add_tokens, grow_embeddings
from vlm.assembly.language_models import check_language_model, check_positions, set_balance_loss
from vlm.assembly.loading import load_complete
from vlm.assembly.native import NATIVE, check_image_mode, resolve_native
from vlm.assembly.quantization import make_quantization_config
from vlm.config.model_schema import EncoderConfig, LanguageModelConfig, ModelConfig, NativeConfig
from vlm.config.named import import_named
from vlm.config.recorded import upgrade_recipe
from vlm.data.encoding.labels import read_template
from vlm.data.processor import Processor
from vlm.models.configuration_vlm import VLMConfig
from vlm.models.connectors import CONNECTORS, connector_options, count_tokens
from vlm.models.encoders import combine_encoders
from vlm.models.modeling_vlm import VLMForConditionalGeneration
from vlm.models.native import NativeResolution
from vlm.models.processing_vlm import VLMProcessor


def compose(model: ModelConfig, template: str | None, image_mode: str | None) -> tuple[VLMConfig, VLMProcessor]:
    """Return configuration and processor of a composition, without weights; refuses parts that do not fit together.

    `template` and `image_mode` are those of `DatasetConfig`.
    """
    register_connector_class(model.connector.type)
    options = connector_options(model.connector.type, model.connector.options)
    vision_configs = [_part_config(part, source) for part, source in encoder_sources(model.visual_encoder).items()]
    text_config = _part_config("language_model", model.language_model).get_text_config()
    label = f"model.language_model.hf_name={model.language_model.hf_name}"
    check_language_model(text_config, label)
    set_balance_loss(text_config, model.language_model.balance_loss, label)
    tokenizer = _load_tokenizer(model)
    if check_image_mode(vision_configs[0], model.visual_encoder, image_mode):
        features, image_processor = resolve_native(model, vision_configs[0], options)
        image_processors, image_mode = [image_processor], NATIVE
    else:
        _check_bounds_unused(model, image_mode)
        features, image_processors = resolve_encoders(model.visual_encoder, vision_configs)
    config = VLMConfig(
        **features,
        text_config=text_config,
        connector={"type": model.connector.type, "options": options},
        image_token_id=tokenizer.get_vocab()[model.image_token],
        positions=model.language_model.positions,
        recipe=asdict(model),
    )
    processor = VLMProcessor(
        image_processors[0],
        tokenizer,
        chat_template=choose_template(template or "tokenizer", tokenizer.chat_template, tokenizer.name_or_path),
        own_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        image_token=model.image_token,
        image_start=model.image_start_token,
        image_end=model.image_end_token,
        tokens_per_image=count_image_tokens(config),
        image_mode=image_mode or "square",
        native=config.native,
        beside=image_processors[1:],
    )
    resolve_anyres(config, processor, model.anyres, image_size(image_processors[0]))
    check_views(processor)
    check_positions(config, label)
    return config, processor


def _check_bounds_unused(model: ModelConfig, image_mode: str | None) -> None:
    """Raise ValueError if bounds of native resolution are given without it."""
    if model.native != NativeConfig():
        raise ValueError(
            f"model.native: dataset.image_mode={image_mode or 'square'} makes all images the same size; "
            "dataset.image_mode=native keeps the size of each"
        )


def build_model(
    model: ModelConfig, config: VLMConfig, processor: Processor, dtype: torch.dtype, seed: int
) -> VLMForConditionalGeneration:
    """Return the model composed of the parts' weights; embeddings grow with the tokenizer.

    The connector's initial weights depend only on `seed`, not on random numbers that the parts drew before.
    """
    attention = model.attn_implementation
    sources = encoder_sources(model.visual_encoder).values()
    bits = model.visual_encoder.quantization
    encoders = [
        _load_part(AutoModel, source, getattr(config, name), dtype, attention, bits, _num_layers(source))
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


def make_generation_config(settings: GenerationConfig | None) -> GenerationConfig:
    """Return the special tokens of a language model's generation settings, without its sampling settings.

    The caller chooses how answers are sampled.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**({} if settings is None else {name: getattr(settings, name) for name in names}))


def count_image_tokens(config: VLMConfig) -> int:
    """Return the number of tokens of an image, at native resolution of the largest one."""
    if config.native is not None:
        native = NativeResolution(**config.native)
        return native.num_queries or native.max_patches // native.factor**2
    return count_tokens(config.connector["type"], config.num_features, config.connector["options"])


def register_connector_class(kind: str) -> None:
    """Import `package.module:Class` and add the class to the table under this name; do nothing for other names."""
    if ":" in kind and kind not in CONNECTORS:
        CONNECTORS[kind] = import_named(kind, "model.connector.type")  # pyright: ignore[reportArgumentType] - theirs


def choose_attention(
    name: str, dtype: torch.dtype | str, config: PreTrainedConfig, auto: type[_BaseAutoModelClass]
) -> str:
    """Return the fastest installed attention implementation that a part supports for `auto`; other names unchanged.

    `dtype` is the precision of the part's weights: flash attention needs half precision.
    """
    if name != "auto":
        return name
    assert auto._model_mapping is not None
    model_class = auto._model_mapping.get(type(config), None)
    half = dtype in (torch.bfloat16, torch.float16)
    if half and torch.cuda.is_available() and is_flash_attn_2_available() and model_class._supports_flash_attn:
        return "flash_attention_2"
    return "sdpa" if model_class is None or model_class._supports_sdpa else "eager"


def choose_template(name: str, own_template: object, source: str) -> str:
    """Return the text of `dataset.template`; for `tokenizer`, the template of the tokenizer of `source`."""
    if name != "tokenizer":
        return read_template(name)
    if not isinstance(own_template, str):
        raise ValueError(f"dataset.template=tokenizer: {source} has no chat template. Name one, such as plain or v1.")
    return own_template


def _part_config(part: str, source: EncoderConfig | LanguageModelConfig) -> PreTrainedConfig:
    """Return a part's configuration; for an encoder with two towers, that of the vision tower."""
    label = f"model.{part}.hf_name={source.hf_name}"
    config = read_config(source.hf_name, label, source.revision, trust_remote_code=source.trust_remote_code)
    if config.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{label}: transformers itself does not know model_type={config.model_type}, so a checkpoint with this "
            "part could not be loaded again"
        )
    if part == "language_model":
        return config
    if hasattr(config, "vision_config"):
        return config.vision_config
    check_is_encoder(config, label)
    return config


def _num_layers(source: EncoderConfig) -> int | None:
    """Return the number of layers of an encoder in its checkpoint, of which fewer may be loaded; None if unknown."""
    return getattr(_part_config("visual_encoder", source), "num_hidden_layers", None)


def _load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the language model's tokenizer, with the image tokens that it lacks and a padding token."""
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
    image_tokens = [model.image_token, model.image_start_token, model.image_end_token]
    known = tokenizer.get_vocab()
    new = [token for token in image_tokens if token is not None and token not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    add_tokens(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _load_part(
    auto: type[_BaseAutoModelClass],
    source: EncoderConfig | LanguageModelConfig,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
    bits: str | None,
    num_layers: int | None = None,
) -> PreTrainedModel:
    return load_complete(
        auto,
        source.hf_name,
        config=config,
        is_part=True,
        num_layers=num_layers,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        dtype=dtype,
        attn_implementation=choose_attention(attention, dtype, config, auto),
        quantization_config=make_quantization_config(bits) if bits else None,
    )


FREE_KEYS = ("attn_implementation", "connector.name", "language_model.new_tokens", "language_model.balance_loss")
"""Keys of `model` that a run may change for a checkpoint, besides sections."""


def recipe_differences(
    config: VLMConfig, model: ModelConfig, overridden_keys: Sequence[str]
) -> list[tuple[str, object, object]]:
    """Return the overridden keys in which `model` contradicts a checkpoint: (key, requested, recorded)."""
    recorded = _flatten(asdict(ModelConfig())) | _flatten(upgrade_recipe(config.recipe))
    requested = _flatten(asdict(model))
    return [
        (f"model.{key}", value, recorded.get(key))
        for key, value in requested.items()
        if any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden_keys)
        and value != recorded.get(key)
        and key not in FREE_KEYS
        and not key.endswith(".quantization")
        and not key.startswith(("anyres.", "head."))
        and not (value is None and key.startswith("connector.options."))
    ]


def _flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return a nested mapping as a flat one with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
