"""The formats that a checkpoint can be exported to: what they do not allow, their configuration and names of weights.

Imports `vlm.hub.layouts`, `vlm.models` and transformers. To add a format, write a class with the methods of
`ExportFormat`, add a line to `EXPORT_FORMATS`, and one to the options of `cli/export_checkpoint.py`.
"""

from typing import Any, Protocol

from transformers import AutoModelForCausalLM, PreTrainedConfig

from vlm.hub.folders import JsonObject
from vlm.hub.layouts import TRANSFORMERS_LLAVA_PREFIXES, PrefixPairs, make_original_prefixes
from vlm.hub.tiles import (
    limits_tiles,
    make_aspect_ratio,
    make_grid_pinpoints,
    make_original_grid_pinpoints,
    native_type,
)
from vlm.models import VLMConfig, VLMProcessor

RESCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
"""Fields of language models whose vocabulary head does more than multiply."""


VIDEO_TOKEN = "<video>"
"""The token of LLaVA-OneVision for videos."""

BICUBIC = 3
"""Pillow's default for resizing, which the original LLaVA uses."""


class ExportFormat(Protocol):
    """A format of checkpoints."""

    def incompatibilities(self, config: VLMConfig, processor: VLMProcessor) -> list[str]:
        """Return why a checkpoint does not fit the format; empty where it fits."""
        ...

    def weight_prefixes(self, config: VLMConfig) -> PrefixPairs:
        """Return the prefixes of names of weights."""
        ...

    def make_config(self, config: VLMConfig, processor: VLMProcessor) -> JsonObject:
        """Return the content of `config.json`."""
        ...


class Llava:
    """transformers' `LlavaForConditionalGeneration`; where images are seen in tiles, LLaVA-NeXT or -OneVision."""

    architectures = {  # noqa: RUF012 - a table
        "llava": "LlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    }

    def incompatibilities(self, config: VLMConfig, processor: VLMProcessor) -> list[str]:
        """See `ExportFormat`."""
        problems = _encoder_incompatibilities(config)
        if config.connector["type"] != "mlp" or config.connector["options"]["num_layers"] != 2:
            problems.append(f"{_describe_connector(config)}: LLaVA has an mlp with num_layers=2")
        problems += _mlp_incompatibilities(config)
        problems += _text_incompatibilities(config)
        problems += _tile_incompatibilities(config, processor)
        for name in ("image_start", "image_end"):
            if token := getattr(processor, name):
                problems.append(f"model.{name}_token={token}: LLaVA has no tokens around an image")
        return problems

    def weight_prefixes(self, config: VLMConfig) -> PrefixPairs:
        """See `ExportFormat`."""
        return TRANSFORMERS_LLAVA_PREFIXES

    def make_config(self, config: VLMConfig, processor: VLMProcessor) -> JsonObject:
        """See `ExportFormat`."""
        text = with_legacy_field_names(config.text_config)
        options = config.connector["options"]
        kind, tiles = "llava", {}
        if (tiling := processor.tiling) is not None:
            kind, tiles = str(native_type(tiling)), {"image_grid_pinpoints": make_grid_pinpoints(tiling)}
            if kind == "llava_onevision":
                video = processor.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
                tiles |= {"vision_aspect_ratio": make_aspect_ratio(tiling), "video_token_index": video}
        return {
            **tiles,
            "architectures": [self.architectures[kind]],
            "model_type": kind,
            "vision_config": _nested_configs(config.vision_config),
            "text_config": text,
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


class OriginalLlava:
    """The original LLaVA's `Llava{Llama,Qwen,Mistral}ForCausalLM`."""

    architectures = {  # noqa: RUF012 - a table
        "llama": "LlavaLlamaForCausalLM",
        "qwen2": "LlavaQwenForCausalLM",
        "mistral": "LlavaMistralForCausalLM",
    }

    def incompatibilities(self, config: VLMConfig, processor: VLMProcessor) -> list[str]:
        """See `ExportFormat`."""
        problems = _encoder_incompatibilities(config)
        recorded = config.recipe["visual_encoder"]
        if config.vision_config.model_type == "siglip_vision_model" and recorded["feature_layer"] != -2:
            problems.append(
                f"model.visual_encoder.feature_layer={recorded['feature_layer']}: the original reads SigLIP at -2 alone"
            )
        if not any(word in recorded["hf_name"].lower() for word in ("clip", "siglip")):
            problems.append(
                f"model.visual_encoder.hf_name={recorded['hf_name']}: the original finds an encoder by `clip` or "
                "`siglip` in its name. Give one with --vision-tower, such as openai/clip-vit-large-patch14-336"
            )
        if config.connector["type"] not in ("mlp", "linear", "identity"):
            problems.append(f"{_describe_connector(config)}: the original has mlp, linear and identity")
        problems += _mlp_incompatibilities(config)
        if config.connector["type"] == "mlp" and config.connector["options"]["activation"] != "gelu":
            problems.append(f"{_describe_connector(config)}: the original's mlp has activation=gelu")
        if config.connector["options"].get("bias") is False:
            problems.append("model.connector.options.bias=false: the original's projector has biases")
        problems += _text_incompatibilities(config)
        if config.text_config.model_type not in self.architectures:
            allowed = ", ".join(self.architectures)
            problems.append(
                f"a language model of model_type={config.text_config.model_type}: the original has {allowed}"
            )
        if (processor.image_start, processor.image_end) not in ((None, None), ("<im_start>", "<im_end>")):
            problems.append(
                f"model.image_start_token={processor.image_start}, image_end_token={processor.image_end}: the original "
                "has <im_start> and <im_end>, or neither"
            )
        return problems + _original_tile_incompatibilities(processor)

    def weight_prefixes(self, config: VLMConfig) -> PrefixPairs:
        """See `ExportFormat`."""
        return make_original_prefixes(config.connector["type"])

    def make_config(self, config: VLMConfig, processor: VLMProcessor) -> JsonObject:
        """See `ExportFormat`.

        `model_type` is the bare `llava` of the first releases: the original's classes take it, and AutoConfig, through
        which SGLang reads it, knows no other. The layer is counted from the first, which holds for the whole encoder
        too, of which the checkpoint has only the layers that are read.
        """
        layer = config.vision_config.num_hidden_layers if config.feature_layer is None else config.feature_layer
        recorded, kind = config.recipe["visual_encoder"], config.connector["type"]
        projector = f"mlp{config.connector['options']['num_layers']}x_gelu" if kind == "mlp" else kind
        tiles: JsonObject = {"image_aspect_ratio": processor.image_mode, "mm_patch_merge_type": "flat"}
        if (tiling := processor.tiling) is not None:
            tiles = {"image_aspect_ratio": make_aspect_ratio(tiling), "mm_patch_merge_type": "spatial_unpad"}
            tiles["image_grid_pinpoints"] = make_original_grid_pinpoints(tiling)
        return {
            **with_legacy_field_names(config.text_config),
            "architectures": [self.architectures[config.text_config.model_type]],
            "model_type": "llava",
            "torch_dtype": _get_text_dtype(config),
            "use_mm_proj": True,
            "mm_vision_tower": recorded["hf_name"],
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
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
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


def _encoder_incompatibilities(config: VLMConfig) -> list[str]:
    kind, problems = config.vision_config.model_type, []
    if config.beside:
        problems.append("model.visual_encoder.extra_encoders: several encoders side by side, and LLaVA has one")
    if isinstance(config.feature_layer, list):
        layers = config.recipe["visual_encoder"]["feature_layer"]
        problems.append(
            f"model.visual_encoder.feature_layer={layers}: several layers; exported are models that read one"
        )
    if config.feature_strategy == "cls":
        problems.append("model.visual_encoder.feature_strategy=cls: LLaVA reads patches, with CLS or without")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        problems.append(f"a visual encoder of model_type={kind}: LLaVA has clip_vision_model or siglip_vision_model")
    elif kind == "siglip_vision_model" and config.feature_layer is None:
        problems.append(
            "model.visual_encoder.feature_layer=null: SigLIP's own output is normalised once more than any layer that "
            "LLaVA can name; train with a layer such as -1 or -2"
        )
    return problems


def _mlp_incompatibilities(config: VLMConfig) -> list[str]:
    options, width = config.connector["options"], config.text_config.hidden_size
    problems = []
    if options.get("input_norm"):
        problems.append("model.connector.options.input_norm=true: LLaVA's projector has no norm")
    if options.get("hidden_dim") not in (None, width):
        problems.append(
            f"model.connector.options.hidden_dim={options['hidden_dim']}: LLaVA's is the text width, {width}"
        )
    return problems


def _tile_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> list[str]:
    """Return which tiles neither LLaVA-NeXT nor LLaVA-OneVision has."""
    tiling, problems = processor.tiling, []
    if tiling is None:
        return []
    kind = native_type(tiling)
    if kind is None:
        problems.append(_shrunk_tiles_message(tiling.max_tiles))
    tokens = processor.tokenizer.get_vocab()
    if kind == "llava_onevision" and VIDEO_TOKEN not in tokens and len(tokens) >= config.text_config.vocab_size:
        problems.append(
            f"a vocabulary of {config.text_config.vocab_size} with no row to spare: LLaVA-OneVision has a {VIDEO_TOKEN}"
        )
    return problems


def _original_tile_incompatibilities(processor: VLMProcessor) -> list[str]:
    """Return which tiles the original LLaVA cannot express."""
    tiling, problems = processor.tiling, []
    if tiling is None:
        return []
    if tiling.tile_several and limits_tiles(tiling):
        problems.append(_shrunk_tiles_message(tiling.max_tiles))
    if (resample := processor.image_processor.resample) != BICUBIC:
        problems.append(f"an image processor with resample={int(resample)}: the original resizes bicubically (3)")
    return problems


def _shrunk_tiles_message(max_tiles: int | None) -> str:
    return (
        f"model.anyres.tile_several=true with max_tiles={max_tiles}: LLaVA-NeXT tiles each of several images and "
        "shrinks none, LLaVA-OneVision shrinks and sees each of several as one square"
    )


def _text_incompatibilities(config: VLMConfig) -> list[str]:
    values = config.text_config.to_dict()
    problems = [
        f"a language model with {name}={values[name]}: LLaVA's logits are the vocabulary head's alone"
        for name in RESCALED_LOGITS
        if values.get(name) not in (None, 1.0)
    ]
    if any(part.to_dict().get("quantization_config") for part in (config.vision_config, config.text_config)):
        problems.append("quantised weights: export the checkpoint before they were quantised")
    return problems


EXPORT_FORMATS: dict[str, ExportFormat] = {"llava": Llava(), "llava-original": OriginalLlava()}
