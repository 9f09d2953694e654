"""The formats that a checkpoint can be exported to: what they do not allow, their configuration and names of weights.

To add a format, write the functions of an `ExportFormat`, add a line to `EXPORT_FORMATS`, and one to
`FORMAT_DESCRIPTIONS` in `config/choices.py`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from transformers import AutoModelForCausalLM, PreTrainedConfig

from vlm.hub.folders import JsonObject
from vlm.hub.layouts import TRANSFORMERS_LLAVA_PREFIXES, PrefixPairs, make_original_prefixes
from vlm.hub.readback import NATIVE, ORIGINAL, Readback
from vlm.hub.tiles import limits_tiles, make_aspect_ratio, make_grid_pinpoints, native_type
from vlm.models import VLMConfig, VLMProcessor

NATIVE_ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
"""`model_type` of transformers' LLaVA -> its class."""

ORIGINAL_ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
}
"""`model_type` of a language model -> the original LLaVA's class."""

RESCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
"""Fields of language models whose vocabulary head does more than multiply."""

VIDEO_TOKEN = "<video>"
"""The token of LLaVA-OneVision for videos."""

BICUBIC = 3
"""Pillow's default for resizing, which the original LLaVA uses."""


class ExportFormat(NamedTuple):
    """A format of checkpoints."""

    incompatibilities: Callable[[VLMConfig, VLMProcessor], Iterator[str]]
    """Why a checkpoint does not fit the format; nothing where it fits."""
    weight_prefixes: Callable[[str], PrefixPairs]
    """The prefixes of names of weights, for a connector of one type."""
    make_config: Callable[[VLMConfig, VLMProcessor], JsonObject]
    """The content of `config.json`."""
    readback: Readback
    """How an export is read back, to compare it with the checkpoint."""


# transformers' `LlavaForConditionalGeneration`; where images are seen in tiles, LLaVA-NeXT or -OneVision


def _native_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    yield from _encoder_incompatibilities(config)
    if config.connector["type"] != "mlp" or config.connector["options"]["num_layers"] != 2:
        yield f"{_describe_connector(config)}: LLaVA has an mlp with num_layers=2"
    yield from _mlp_incompatibilities(config)
    yield from _text_incompatibilities(config)
    if (tiling := processor.tiling) is not None:
        kind = native_type(tiling)
        if kind is None:
            yield _shrunk_tiles_message(tiling.max_tiles)
        tokens, rows = processor.tokenizer.get_vocab(), config.text_config.vocab_size
        if kind == "llava_onevision" and VIDEO_TOKEN not in tokens and len(tokens) >= rows:
            yield f"a vocabulary of {rows} with no row to spare: LLaVA-OneVision has a {VIDEO_TOKEN}"
    for name in ("image_start", "image_end"):
        if token := getattr(processor, name):
            yield f"model.{name}_token={token}: LLaVA has no tokens around an image"


def _make_native_config(config: VLMConfig, processor: VLMProcessor) -> JsonObject:
    options = config.connector["options"]
    kind, tiles = "llava", {}
    if (tiling := processor.tiling) is not None:
        kind, tiles = str(native_type(tiling)), {"image_grid_pinpoints": make_grid_pinpoints(tiling)}
        if kind == "llava_onevision":
            video = processor.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
            tiles |= {"vision_aspect_ratio": make_aspect_ratio(tiling), "video_token_index": video}
    return {
        **tiles,
        "architectures": [NATIVE_ARCHITECTURES[kind]],
        "model_type": kind,
        "vision_config": _nested_configs(config.vision_config),
        "text_config": with_legacy_field_names(config.text_config),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.num_features,
        "projector_hidden_act": options["activation"],
        "multimodal_projector_bias": options["bias"],
        "vision_feature_layer": get_last_layer(config),
        "vision_feature_select_strategy": select_strategy(config),
        "tie_word_embeddings": bool(config.text_config.tie_word_embeddings),
        "dtype": _get_text_dtype(config),
        "torch_dtype": _get_text_dtype(config),
    }


# The original LLaVA's `Llava{Llama,Qwen,Mistral}ForCausalLM`


def _original_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    yield from _encoder_incompatibilities(config)
    encoder, connector, text = config.recipe["visual_encoder"], config.connector, config.text_config.model_type
    if config.vision_config.model_type == "siglip_vision_model" and encoder["feature_layer"] != -2:
        yield f"model.visual_encoder.feature_layer={encoder['feature_layer']}: the original reads SigLIP at -2 alone"
    if not any(word in encoder["hf_name"].lower() for word in ("clip", "siglip")):
        yield (
            f"model.visual_encoder.hf_name={encoder['hf_name']}: the original finds an encoder by `clip` or `siglip` "
            "in its name. Give one with --vision-tower, such as openai/clip-vit-large-patch14-336"
        )
    if connector["type"] not in ("mlp", "linear", "identity"):
        yield f"{_describe_connector(config)}: the original has mlp, linear and identity"
    yield from _mlp_incompatibilities(config)
    if connector["type"] == "mlp" and connector["options"]["activation"] != "gelu":
        yield f"{_describe_connector(config)}: the original's mlp has activation=gelu"
    if connector["options"].get("bias") is False:
        yield "model.connector.options.bias=false: the original's projector has biases"
    yield from _text_incompatibilities(config)
    if text not in ORIGINAL_ARCHITECTURES:
        yield f"a language model of model_type={text}: the original has {', '.join(ORIGINAL_ARCHITECTURES)}"
    if (processor.image_start, processor.image_end) not in ((None, None), ("<im_start>", "<im_end>")):
        yield (
            f"model.image_start_token={processor.image_start}, image_end_token={processor.image_end}: the original has "
            "<im_start> and <im_end>, or neither"
        )
    if (tiling := processor.tiling) is not None:
        if tiling.tile_several and limits_tiles(tiling):
            yield _shrunk_tiles_message(tiling.max_tiles)
        if (resample := processor.image_processor.resample) != BICUBIC:
            yield f"an image processor with resample={int(resample)}: the original resizes bicubically (3)"


def _make_original_config(config: VLMConfig, processor: VLMProcessor) -> JsonObject:
    """Return the content of `config.json`.

    `model_type` is the bare `llava` of the first releases: the original's classes take it, and AutoConfig, through
    which SGLang reads it, knows no other. The layer is counted from the first, which holds for the whole encoder too,
    of which the checkpoint has only the layers that are read.
    """
    layer = config.vision_config.num_hidden_layers if config.feature_layer is None else config.feature_layer
    kind = config.connector["type"]
    projector = f"mlp{config.connector['options']['num_layers']}x_gelu" if kind == "mlp" else kind
    tiles: JsonObject = {"image_aspect_ratio": processor.image_mode, "mm_patch_merge_type": "flat"}
    if (tiling := processor.tiling) is not None:
        tiles = {"image_aspect_ratio": make_aspect_ratio(tiling), "mm_patch_merge_type": "spatial_unpad"}
        tiles["image_grid_pinpoints"] = [[width, height] for height, width in make_grid_pinpoints(tiling)]
    return {
        **with_legacy_field_names(config.text_config),
        "architectures": [ORIGINAL_ARCHITECTURES[config.text_config.model_type]],
        "model_type": "llava",
        "torch_dtype": _get_text_dtype(config),
        "use_mm_proj": True,
        "mm_vision_tower": config.recipe["visual_encoder"]["hf_name"],
        "mm_hidden_size": config.vision_dim,
        "mm_projector_type": projector,
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch" if config.feature_strategy == "patch" else "cls_patch",
        "mm_use_im_start_end": processor.image_start is not None,
        "mm_use_im_patch_token": False,
        **tiles,
        "image_token_index": config.image_token_id,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": config.text_config.max_position_embeddings,
    }


EXPORT_FORMATS = {
    "llava": ExportFormat(
        _native_incompatibilities, lambda _: TRANSFORMERS_LLAVA_PREFIXES, _make_native_config, NATIVE
    ),
    "llava-original": ExportFormat(
        _original_incompatibilities, make_original_prefixes, _make_original_config, ORIGINAL
    ),
}


# What both formats need


def select_strategy(config: VLMConfig) -> str:
    """Return transformers' word for the tokens that are read: `default` drops the first."""
    return "default" if config.feature_strategy == "patch" and config.num_prefix_tokens == 1 else "full"


def get_last_layer(config: VLMConfig) -> int:
    """Return the layer that is read, counted from the end of the layers that the checkpoint has."""
    states = config.vision_config.num_hidden_layers + 1
    return -1 if config.feature_layer is None else config.feature_layer - states


def with_legacy_field_names(config: PreTrainedConfig) -> JsonObject:
    """Return a language model's configuration under the field names of transformers 5 and under the earlier ones."""
    values = _nested_configs(config)
    model_class = cast(type, AutoModelForCausalLM._model_mapping[type(config)])
    values["architectures"] = [model_class.__name__]
    rotary = values.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        values["rope_theta"] = rotary["rope_theta"]
        scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return values


def _nested_configs(config: PreTrainedConfig) -> JsonObject:
    values = config.to_dict()
    values.pop("_name_or_path", None)
    values.pop("transformers_version", None)
    return values


def _get_text_dtype(config: VLMConfig) -> str:
    return str(config.dtype or "float32").removeprefix("torch.")


def _describe_connector(config: VLMConfig) -> str:
    options = config.connector["options"]
    shown = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    return f"model.connector.type={config.connector['type']}" + (f" ({shown})" if shown else "")


def _encoder_incompatibilities(config: VLMConfig) -> Iterator[str]:
    kind, encoder = config.vision_config.model_type, "model.visual_encoder"
    if config.native is not None:
        yield "dataset.image_mode=native: LLaVA has images of one size, or tiles"
    if config.positions != "plain":
        yield f"model.language_model.positions={config.positions}: LLaVA counts positions in one dimension"
    if config.beside:
        yield f"{encoder}.extra_encoders: several encoders side by side, and LLaVA has one"
    if isinstance(config.feature_layer, list):
        layers = config.recipe["visual_encoder"]["feature_layer"]
        yield f"{encoder}.feature_layer={layers}: several layers; exported are models that read one"
    if config.feature_strategy == "cls":
        yield f"{encoder}.feature_strategy=cls: LLaVA reads patches, with CLS or without"
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        yield f"a visual encoder of model_type={kind}: LLaVA has clip_vision_model or siglip_vision_model"
    elif kind == "siglip_vision_model" and config.feature_layer is None:
        yield (
            f"{encoder}.feature_layer=null: SigLIP's own output is normalised once more than any layer that LLaVA can "
            "name; train with a layer such as -1 or -2"
        )


def _mlp_incompatibilities(config: VLMConfig) -> Iterator[str]:
    options, width = config.connector["options"], config.text_config.hidden_size
    if options.get("input_norm"):
        yield "model.connector.options.input_norm=true: LLaVA's projector has no norm"
    if (hidden := options.get("hidden_dim")) not in (None, width):
        yield f"model.connector.options.hidden_dim={hidden}: LLaVA's is the text width, {width}"


def _text_incompatibilities(config: VLMConfig) -> Iterator[str]:
    values = config.text_config.to_dict()
    if values.get("hidden_size_per_layer_input"):
        yield f"a language model of model_type={config.text_config.model_type}: LLaVA looks no tokens up in each layer"
    for name in RESCALED_LOGITS:
        if values.get(name) not in (None, 1.0):
            yield f"a language model with {name}={values[name]}: LLaVA's logits are the vocabulary head's alone"
    if any(part.to_dict().get("quantization_config") for part in (config.vision_config, config.text_config)):
        yield "quantised weights: export the checkpoint before they were quantised"


def _shrunk_tiles_message(max_tiles: int | None) -> str:
    return (
        f"model.anyres.tile_several=true with max_tiles={max_tiles}: LLaVA-NeXT tiles each of several images and "
        "shrinks none, LLaVA-OneVision shrinks and sees each of several as one square"
    )
