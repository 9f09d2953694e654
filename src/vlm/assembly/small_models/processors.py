"""A processor of any type's own classes, made without files, with their default options or those of a configuration."""

import inspect
from collections.abc import Iterator, Mapping
from typing import cast

from transformers import CONFIG_MAPPING, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from vlm.assembly.small_models.fields import Fields, get_fields, is_int, is_list, walk
from vlm.assembly.small_models.tokenizers import FurtherTokens, make_tokenizer

BACKENDS = ("torchvision", "pil")
"""Of the classes of a type's image processor, the one that is taken first."""
SAME_NUMBER = {
    "merge_size": ("spatial_merge_size",),
    "max_image_tiles": ("max_num_tiles",),
    "pooling_ratio": ("projector_pooling_ratio",),
    "image_seq_length": ("mm_tokens_per_image", "vision_soft_tokens_per_image"),
    "img_size": ("image_size",),
}
"""An option of a processor -> other names of it in configurations."""
OPTIONS = frozenset({
    "patch_size", "temporal_patch_size", "merge_size", "spatial_merge_size", "image_grid_pinpoints", "max_image_tiles",
    "downsample_factor", "downsample_ratio", "image_seq_length", "vision_feature_select_strategy", "img_size",
    "vision_aspect_ratio", "pooling_ratio", "num_query_tokens", "encoder_patch_size", "pooling_kernel_size",
    "downsample_rate",
})  # fmt: skip
"""Options that follow from a configuration."""
BORROWED = {
    "cosmos3_omni": "qwen3_vl",
    "fast_vlm": "llava",
    "glm_ocr": "glm46v",
    "glmga": "glm46v",
    "nemotron_h_omni": "parakeet_ctc",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
}
"""A type that transformers maps to no processor, or not to each of its parts -> the type whose its checkpoints name."""


PART_OPTIONS: dict[str, Fields] = {
    "aria": {"max_image_size": 490},
    "chameleon": {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}},
    "emu3": {"min_pixels": 64 * 64, "max_pixels": 128 * 128},
    "gemma4": {"max_soft_tokens": 70},
    "perception_lm": {"vision_input_type": "vanilla"},
    "step3p7": {"patch_size": 504},
    "dots3_note": {"temporal_patch_size": 1},
    "paligemma": {"image_seq_length": 256},
    "idefics3": {"size": {"longest_edge": 364}, "max_image_size": {"longest_edge": 364}},
    "smolvlm": {"size": {"longest_edge": 364}, "max_image_size": {"longest_edge": 364}},
    "fast_vlm": {"size": {"height": 512, "width": 512}, "crop_size": {"height": 512, "width": 512}},
}
"""A type -> options of its image and video processors that do not follow from the configuration."""
PROCESSOR_OPTIONS: dict[str, Fields] = {
    "chameleon": {"image_seq_length": 64},
    "fast_vlm": {"patch_size": 64},
    "perception_lm": {"patch_size": 14},
    "vipllava": {"vision_feature_select_strategy": "default"},
}
"""A type -> options of its processor that do not follow from the configuration."""
PATCH_OPTIONS = {"temporal_patch_size"}
"""Of these, the options that one layer of patches asks of images and videos alike."""
MAX_TILES = 2
"""Tiles of an image, at most."""


def make_processor(config: PreTrainedConfig, further: FurtherTokens | None = None) -> ProcessorMixin:
    """Return a processor of a configuration's type.

    Args:
        config: the configuration, whose patches, tiles and numbers of tokens the processor takes over.
        further: special tokens in addition to those that the class asks for.

    Raises:
        ValueError: transformers maps no processor to the type.
    """
    kind = find_processor_class(config)
    parts = {name: _make_part(name, kind, config, further or FurtherTokens()) for name in kind.get_attributes()}
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in _options(config).items() if name in known}
    return kind(**parts, **options | PROCESSOR_OPTIONS.get(config.model_type, {}))


def find_processor_class(config: PreTrainedConfig) -> type[ProcessorMixin]:
    """Return the class of a type's processor; raise ValueError if it has none."""
    for kind in _config_classes(config):
        if kind in PROCESSOR_MAPPING and (found := PROCESSOR_MAPPING[kind]) is not None:
            return cast(type[ProcessorMixin], found)
    raise ValueError(f"model_type={config.model_type}: transformers maps no processor to it")


def _config_classes(config: PreTrainedConfig) -> Iterator[type[PreTrainedConfig]]:
    yield type(config)
    if config.model_type in BORROWED:
        yield CONFIG_MAPPING[BORROWED[config.model_type]]


def _make_part(name: str, kind: type[ProcessorMixin], config: PreTrainedConfig, further: FurtherTokens) -> object:
    """Return one part of a processor, such as its `image_processor`."""
    if name.endswith("tokenizer"):
        return make_tokenizer(kind, further)
    mapping = {"image_processor": IMAGE_PROCESSOR_MAPPING, "video_processor": VIDEO_PROCESSOR_MAPPING}.get(
        name, FEATURE_EXTRACTOR_MAPPING
    )
    part = next(_part_classes(mapping, kind, config), None)
    if part is None:
        raise ValueError(f"model_type={config.model_type}: transformers maps no {name} to it")
    own = PART_OPTIONS.get(config.model_type, {})
    known = own if name == "image_processor" else {option: own[option] for option in PATCH_OPTIONS & own.keys()}
    if hasattr(part, "draw_on_frames"):
        known = {**known, "draw_on_frames": False}  # with a font, which is a file
    return part(**_part_options(part, config) | known)


def _part_classes(
    mapping: Mapping[type, object], kind: type[ProcessorMixin], config: PreTrainedConfig
) -> Iterator[type]:
    """Yield the classes of one part: those of the type, then those of other types with the same class of processor."""
    others = (other for other in PROCESSOR_MAPPING.keys() if PROCESSOR_MAPPING[other] is kind)  # noqa: SIM118 - a lazy mapping
    for config_class in (*_config_classes(config), *others):
        found = mapping[config_class] if config_class in mapping else None  # noqa: SIM401 - a lazy mapping
        if isinstance(found, dict):
            found = next((found[backend] for backend in BACKENDS if found.get(backend)), None)
        if isinstance(found, type):
            yield found


def _part_options(part: type, config: PreTrainedConfig) -> dict[str, object]:
    """Return the options of an image or video processor that fit a configuration."""
    options = {name: value for name, value in _options(config).items() if hasattr(part, name)}
    side = _find(config, "image_size")
    size = getattr(part, "size", None)
    if isinstance(side, int) and isinstance(size, dict):
        if size.keys() == {"height", "width"}:
            options["size"] = {"height": side, "width": side}
        elif size.keys() == {"shortest_edge"}:
            options["size"] = {"shortest_edge": side}
        if getattr(part, "crop_size", None):
            options["crop_size"] = {"height": side, "width": side}
    options |= {name: MAX_TILES for name in ("max_patches", "max_num_tiles") if is_int(getattr(part, name, None))}
    return options


def _options(config: PreTrainedConfig) -> dict[str, object]:
    """Return the options that follow from a configuration."""
    found = {name: _find(config, name, *SAME_NUMBER.get(name, ())) for name in OPTIONS}
    options = {name: value for name, value in found.items() if value is not None}
    side, patch = _find(config, "image_size"), _find(config, "patch_size")
    if is_int(side) and is_int(patch):
        options["num_image_tokens"] = (side // patch) ** 2
    if getattr(getattr(config, "vision_config", None), "model_type", "") == "clip_vision_model":
        options["num_additional_image_tokens"] = 1
    return options


def _find(config: PreTrainedConfig, *names: str) -> object:
    """Return the value of the first of these fields, the visual encoder's before others; of equal pairs one number."""
    nested = sorted(walk(config), key=lambda part: not _is_visual(part))
    for name in names:
        for part in nested:
            value = get_fields(part).get(name)
            if is_list(value) and len(value) == 2 and value[0] == value[1]:
                value = value[0]
            if value is not None:
                return value
    return None


def _is_visual(config: PreTrainedConfig) -> bool:
    return "vision" in type(config).__name__.lower()
