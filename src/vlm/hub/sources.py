"""Reading foreign checkpoints: their configuration as ours, and where their weights are.

To import another kind of checkpoint, write a function that returns a `ForeignCheckpoint`, and call it in `read_source`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    PreTrainedConfig,
    SiglipImageProcessor,
)
from transformers.image_utils import PILImageResampling

from vlm.assembly.encoders import image_size
from vlm.assembly.foreign_config import load_config
from vlm.assembly.loading import inspect_checkpoint
from vlm.assembly.opening import opening
from vlm.checks.checkpoint_files import shown
from vlm.config.model_schema import AnyResConfig, ConnectorConfig, LanguageModelConfig, ModelConfig, VisualEncoderConfig
from vlm.hub.adapters import Adapter, read_adapter
from vlm.hub.folders import JsonObject, read_json, resolve_folder
from vlm.hub.layouts import TRANSFORMERS_LLAVA_PREFIXES, PrefixPairs, make_original_prefixes
from vlm.hub.shards import weight_files
from vlm.hub.tiles import is_tiled, read_native, read_original

T = TypeVar("T")

ORIGINAL_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
}
"""`model_type` of the original LLaVA -> its language model's."""

ARCHITECTURES = {"LlavaQwenForCausalLM": "qwen2", "LlavaMistralForCausalLM": "mistral"}
"""The class, where the original's `model_type` is the bare `llava`."""

NATIVE_TYPES = ("llava", "llava_next", "llava_onevision")
"""`model_type` of transformers' classes that are imported."""

NATIVE_FAMILIES = ("llava_next_video", "vipllava", "video_llava")
VISION_TOWER_TYPES = ("clip_vision_model", "siglip_vision_model")

ORIGINAL_LLAVA_FIELDS = re.compile(
    r"mm_|tune_mm|freeze_mm|unfreeze_mm|use_mm|image_|vision_|text_config|projector_|multimodal_|tokenizer_|"
    r"(model_type|architectures|auto_map|transformers_version|_name_or_path|torch_dtype|dtype|s2|s2_scales|"
    r"use_pos_skipping|pos_skipping_range|add_faster_video|add_time_instruction|faster_token_stride|force_sample)$"
)
"""Fields of an original configuration that do not belong to its language model."""


@dataclass
class WeightStore:
    """Files of weights, and the prefixes of their names with ours."""

    files: list[Path]
    table: PrefixPairs


@dataclass
class ForeignCheckpoint:
    """A foreign checkpoint.

    Attributes:
        recipe: the parts, under the names that the source has for them.
        text_config: the language model's configuration.
        text_folder: the folder with the language model's tokenizer and generation settings.
        stores: weights; where two stores have the same name, the first one counts.
        image_mode: `dataset.image_mode` with which the source was trained.
        encoder: name of the encoder's configuration, image processor and, if the stores lack them, weights.
        vision_config: the encoder's configuration, where it is part of the source.
        image_processor: the encoder's image processor, where it is part of the source.
        adapter: the adapter to merge into the stores' weights.
    """

    recipe: ModelConfig
    text_config: PreTrainedConfig
    text_folder: Path
    stores: list[WeightStore]
    image_mode: str
    encoder: str | None = None
    vision_config: PreTrainedConfig | None = None
    image_processor: Any = None
    adapter: Adapter = field(default_factory=lambda: Adapter({}, {}))


def read_source(name: str, base_model: str | None, vision_tower: str | None) -> ForeignCheckpoint:
    """Find out what a foreign checkpoint is, and return its description; see `import_checkpoint` for the arguments."""
    folder = resolve_folder(name)
    inspect_checkpoint(str(folder))
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str | None):
        raise ValueError(f"{name}: config.json has model_type={shown(kind)}; a text is needed")
    if kind == "vlm":
        raise ValueError(f"{name} is already a checkpoint of this framework")
    if not values:
        raise ValueError(
            f"{name} contains no config.json, which must stand beside the weights (for projectors and adapters too)"
        )
    if kind in NATIVE_FAMILIES:
        raise ValueError(
            f"{name} is a {kind}, which cannot be rebuilt from separate parts. `vlm models` lists "
            "the families that are "
            "finetuned as they are (model=llava-next-video-7b …)"
        )
    if kind in NATIVE_TYPES and "mm_vision_tower" not in values:
        _refuse_flag(name, "--base-model", base_model)
        _refuse_flag(name, "--vision-tower", vision_tower)
        with opening(name):
            return _read_transformers_llava(name, folder)
    if kind in ORIGINAL_TYPES and "mm_vision_tower" in values:
        with opening(name):
            return _read_original_llava(name, folder, values, base_model, vision_tower)
    raise ValueError(
        f"{name} has model_type={kind}; only the original LLaVA's can be imported "
        f"({', '.join(ORIGINAL_TYPES)}, with an "
        f"mm_vision_tower) and transformers' {', '.join(NATIVE_TYPES)}"
    )


def _refuse_flag(name: str, flag: str, value: str | None) -> None:
    if value is not None:
        raise ValueError(f"{name} is complete; leave out {flag}={value}")


def _read_transformers_llava(name: str, folder: Path) -> ForeignCheckpoint:
    """Read transformers' LLaVA, LLaVA-NeXT or LLaVA-OneVision."""
    config = load_config(folder, str(folder))
    assert isinstance(config, LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig)
    vision, text = config.vision_config, config.text_config
    assert isinstance(vision, PreTrainedConfig)
    assert isinstance(text, PreTrainedConfig)
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if vision.model_type not in VISION_TOWER_TYPES:
        raise ValueError(f"{name}: its encoder is a {vision.model_type}; imported are {', '.join(VISION_TOWER_TYPES)}")
    if not isinstance(layer, int):
        raise ValueError(f"{name}: vision_feature_layer={layer}; a composed model reads one layer")
    if vision.model_type == "siglip_vision_model" and strategy == "default":
        raise ValueError(
            f"{name}: vision_feature_select_strategy=default drops a CLS token, and SigLIP has none: it drops the "
            "first patch, which a composed model does not. Imported is full"
        )
    text.tie_word_embeddings = config.tie_word_embeddings  # which LLaVA-NeXT alone has apart from its text_config's
    processor, image_mode, anyres = _read_native_image_settings(name, folder, config)
    options = {"activation": config.projector_hidden_act, "bias": config.multimodal_projector_bias}
    settings = read_json(folder / "processor_config.json")
    tokens = "patch" if strategy == "default" else "full"
    recipe = ModelConfig(
        visual_encoder=VisualEncoderConfig(name, feature_layer=layer, feature_strategy=tokens),
        connector=ConnectorConfig("mlp", options),
        language_model=LanguageModelConfig(name),
        image_token=settings.get("image_token", ModelConfig.image_token),
        anyres=anyres,
    )
    return ForeignCheckpoint(
        recipe,
        text,
        folder,
        [_make_store(name, folder, TRANSFORMERS_LLAVA_PREFIXES)],
        image_mode,
        vision_config=vision,
        image_processor=processor,
    )


def _read_native_image_settings(name: str, folder: Path, config: PreTrainedConfig) -> tuple[Any, str, AnyResConfig]:
    """Return the encoder's image processor, image mode and tiles that do what transformers' image processor does.

    LLaVA's own class is CLIP's with padding to a square; LLaVA-NeXT's and LLaVA-OneVision's are CLIP's with tiles.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} brings no image processor: {str(error).splitlines()[0]}") from error
    kind = SiglipImageProcessor if config.vision_config.model_type == "siglip_vision_model" else CLIPImageProcessor
    if config.model_type == "llava":
        if not isinstance(processor, LlavaImageProcessor):
            return processor, "square", AnyResConfig()
        plain = _make_untiled_image_processor(processor, CLIPImageProcessor)
        return plain, "pad" if processor.do_pad else "square", AnyResConfig()
    if not isinstance(processor, LlavaNextImageProcessor | LlavaOnevisionImageProcessor):
        raise ValueError(f"{name}: its image processor is a {type(processor).__name__}, which cuts no tiles")
    size, crop = cast(Any, processor.size), cast(Any, processor.crop_size)
    whole = (size.height, size.width) if size.height and size.width else (size.shortest_edge,) * 2
    tile = (crop.height if crop else None) or size.height or size.shortest_edge
    if set(whole) != {tile}:
        raise ValueError(f"{name}: it sees the whole image in {whole} pixels and tiles of {tile}; needed is one size")
    return _make_untiled_image_processor(processor, kind), "square", read_native(name, config, processor, tile)


def _make_untiled_image_processor(processor: Any, kind: Callable[..., T]) -> T:
    """Return an image processor of a class that does no more than to resize, crop and normalise."""
    names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize")
    values = {key: value for key, value in processor.to_dict().items() if key in names and value is not None}
    return kind(**values, do_center_crop=bool(processor.do_center_crop))


def _read_original_llava(
    name: str, folder: Path, values: JsonObject, base_model: str | None, vision_tower: str | None
) -> ForeignCheckpoint:
    """Read the original code's output: a whole model, a projector, or an adapter."""
    connector = _make_connector_config(name, values)
    table = make_original_prefixes(connector.type)
    encoder = vision_tower or str(values["mm_vision_tower"])
    visual_encoder = _make_encoder_config(name, values, encoder)
    recipe = ModelConfig(
        visual_encoder=visual_encoder, connector=connector, language_model=LanguageModelConfig(base_model or name)
    )
    if values.get("mm_use_im_start_end"):
        recipe.image_start_token, recipe.image_end_token = "<im_start>", "<im_end>"
    vision = processor = None
    if is_tiled(name, values):
        vision = load_config(encoder, encoder)
        vision = getattr(vision, "vision_config", vision)
        processor = AutoImageProcessor.from_pretrained(encoder, trust_remote_code=False)
        processor.resample = PILImageResampling.BICUBIC  # as the original resizes
        recipe.anyres = read_original(name, values, image_size(processor)[0])
    adapter = Adapter({}, {})
    projector = folder / "mm_projector.bin"
    if (folder / "adapter_config.json").is_file():
        trained_on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        base = _require_base_folder(name, "an adapter", base_model, f" It was trained on {trained_on}.")
        adapter, stores = read_adapter(folder), [_make_store(str(base_model), base, table)]
    elif weight_files(folder):
        _refuse_flag(name, "--base-model", base_model)
        base, stores = folder, [_make_store(name, folder, table)]
    elif projector.is_file():
        base = _require_base_folder(name, "a projector", base_model, "")
        stores = [WeightStore([projector], table), _make_store(str(base_model), base, table)]
    else:
        raise ValueError(f"{name} contains no weights: no safetensors, pytorch_model.bin, adapter or mm_projector.bin")
    image_mode = "pad" if values.get("image_aspect_ratio") == "pad" else "square"
    return ForeignCheckpoint(
        recipe, _read_text_config(base), base, stores, image_mode, encoder, vision, processor, adapter
    )


def _require_base_folder(name: str, kind: str, base_model: str | None, hint: str) -> Path:
    if base_model is None:
        raise ValueError(f"{name} is {kind} alone: name its language model with --base-model FOLDER.{hint}")
    return resolve_folder(base_model)


def _read_text_config(folder: Path) -> PreTrainedConfig:
    """Return the language model's configuration, from that of an original LLaVA or its own."""
    values = read_json(folder / "config.json")
    if "mm_vision_tower" not in values:
        return load_config(folder, str(folder)).get_text_config()
    return make_original_text_config(values)


def make_original_text_config(values: JsonObject) -> PreTrainedConfig:
    """Return the configuration of the language model in an original LLaVA's `config.json`."""
    architecture = (values.get("architectures") or [""])[0]
    kind = ARCHITECTURES.get(architecture, ORIGINAL_TYPES[values["model_type"]])
    return CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if not ORIGINAL_LLAVA_FIELDS.match(key)})


def _make_connector_config(name: str, values: JsonObject) -> ConnectorConfig:
    """Return the connector; raises ValueError for a projector that no connector here computes."""
    if values.get("mm_resampler_type") or values.get("s2"):
        raise ValueError(f"{name}: resamplers and multi-scale features (s2) have no matching connector")
    kind = values.get("mm_projector_type") or "linear"
    if kind in ("linear", "identity"):
        return ConnectorConfig(kind, {})
    if layers := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return ConnectorConfig("mlp", {"num_layers": int(layers[1])})
    raise ValueError(f"{name}: mm_projector_type={kind}; imported are linear, mlp<N>x_gelu and identity")


def _make_encoder_config(name: str, values: JsonObject, encoder: str) -> VisualEncoderConfig:
    """Return the encoder; raises ValueError where its configuration does not load, or a field is not supported."""
    try:
        config = load_config(encoder, encoder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: its encoder mm_vision_tower={encoder} does not load; name its folder with --vision-tower FOLDER. "
            f"transformers says: {str(error).splitlines()[0]}"
        ) from error
    if "siglip" in config.model_type:  # the original drops its last layer and keeps every token, whatever fields say
        return VisualEncoderConfig(encoder, feature_layer=-2)
    features = {"patch": "patch", "cls_patch": "cls+patch"}
    feature = values.get("mm_vision_select_feature", "patch")
    if feature not in features:
        raise ValueError(f"{name}: mm_vision_select_feature={feature}; imported are {', '.join(features)}")
    if not isinstance(values.get("mm_vision_select_layer"), int):
        raise ValueError(f"{name}: its config.json has no mm_vision_select_layer (LLaVA-1.5: -2)")
    return VisualEncoderConfig(
        encoder, feature_layer=values["mm_vision_select_layer"], feature_strategy=features[feature]
    )


def _make_store(name: str, folder: Path, table: PrefixPairs) -> WeightStore:
    files = weight_files(folder)
    if not files:
        raise ValueError(
            f"{name} contains no weights: neither model.safetensors nor pytorch_model.bin, nor their index"
        )
    return WeightStore(files, table)
