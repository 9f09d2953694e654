"""Exported processors: transformers' own classes, set up to do what ours does.

Imports `vlm.hub`, `vlm.models` and transformers.
"""

from typing import Any

from transformers import (
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
)

from vlm.assembly.encoders import image_size
from vlm.hub.targets import VIDEO_TOKEN, select_strategy
from vlm.hub.templates import exported
from vlm.hub.tiles import aspect_of, native_type, sizes_of
from vlm.models import VLMConfig, VLMProcessor
from vlm.models.anyres import AnyRes

WORD = "What"


def transformers_processor(config: VLMConfig, processor: VLMProcessor, *, sees: bool) -> Any:
    """Transformers' processor for what ours does.

    Args:
        config: the checkpoint's.
        processor: ours.
        sees: whether it pads pictures and cuts them into tiles where ours does; else whoever calls it has to.
    """
    tokenizer = processor.tokenizer
    spaced = begins_words_at_the_start_alone(tokenizer, processor.image_token)
    tokenizer.chat_template = None
    common: dict[str, Any] = {
        "vision_feature_select_strategy": select_strategy(config),
        "chat_template": exported(str(processor.chat_template), processor.image_token, spaced=spaced),
        "image_token": processor.image_token,
    }
    counting = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": config.num_prefix_tokens}
    tiling = processor.tiling
    if tiling is None or not sees:
        return LlavaProcessor(_image_processor(processor, pads=sees), tokenizer, **counting, **common)
    if native_type(tiling) == "llava_next":
        return LlavaNextProcessor(_tiled(processor, tiling, LlavaNextImageProcessor), tokenizer, **counting, **common)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]}, replace_extra_special_tokens=False)
    seen = _tiled(processor, tiling, LlavaOnevisionImageProcessor)
    frames = {key: getattr(seen, key) for key in ("image_mean", "image_std", "resample", "rescale_factor")}
    frames["size"] = {"height": tiling.tile_size, "width": tiling.tile_size}
    return LlavaOnevisionProcessor(
        seen, tokenizer, LlavaOnevisionVideoProcessor(**frames), video_token=VIDEO_TOKEN,
        num_image_tokens=config.num_patches + config.num_prefix_tokens, vision_aspect_ratio=aspect_of(tiling), **common,
    )  # fmt: skip


def _tiled(processor: VLMProcessor, tiling: AnyRes, kind: Any) -> Any:
    """An image processor of a `kind` that cuts tiles, each as large as the encoder's pictures."""
    own, side = processor.image_processor, tiling.tile_size
    square = {"height": side, "width": side}
    return kind(
        size={"shortest_edge": side} if own.do_center_crop else square,
        crop_size=square,
        do_center_crop=bool(own.do_center_crop),
        image_grid_pinpoints=sizes_of(tiling),
        **{key: getattr(own, key) for key in ("image_mean", "image_std", "resample", "rescale_factor")},
    )


def _image_processor(processor: VLMProcessor, *, pads: bool) -> Any:
    """The encoder's own image processor, or LLaVA's where pictures are padded; `crop_size` is what vLLM looks at."""
    own = processor.image_processor
    height, width = image_size(own)
    values = {**own.to_dict(), "crop_size": {"height": height, "width": width}}
    kind = LlavaImageProcessor if pads and processor.image_mode == "pad" else type(own)
    if kind is LlavaImageProcessor:
        values |= {"do_pad": True, "do_center_crop": bool(own.do_center_crop)}
    for key in ("image_processor_type", "auto_map", "processor_class"):
        values.pop(key, None)
    return kind(**values)


def begins_words_at_the_start_alone(tokenizer: Any, image_token: str) -> bool:
    """Whether a blank has to be written between a special token and a text for the ids that the text has on its own."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    alone, behind, spaced = ids(WORD), ids(image_token + WORD)[1:], ids(f"{image_token} {WORD}")[1:]
    return alone != behind and alone == spaced
