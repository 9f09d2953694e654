"""Exported processors: transformers' own classes, set up to do what ours does."""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vlm.assembly.encoders import image_size
from vlm.hub.targets import VIDEO_TOKEN, select_strategy
from vlm.hub.templates import export_template
from vlm.hub.tiles import make_aspect_ratio, make_grid_pinpoints, native_type
from vlm.models import VLMConfig, VLMProcessor
from vlm.models.anyres import AnyRes
from vlm.models.pixels import as_rgb
from vlm.models.processing_messages import thinks

PROBE_WORD = "What"
PIXEL_SETTINGS = ("image_mean", "image_std", "resample", "rescale_factor")


def make_transformers_processor(config: VLMConfig, processor: VLMProcessor, *, prepares_images: bool) -> ProcessorMixin:
    """Return transformers' processor that does what ours does.

    Unless it `prepares_images`, its caller has to pad images and cut them into tiles where ours does.
    """
    tokenizer = processor.tokenizer
    space_after_image = needs_space_after_special_token(tokenizer, processor.image_token)
    tokenizer.chat_template = None
    template = export_template(
        str(processor.chat_template),
        processor.image_token,
        space_after_image=space_after_image,
        thinks=thinks(tokenizer),
    )
    common: dict[str, Any] = {
        "vision_feature_select_strategy": select_strategy(config),
        "chat_template": template,
        "image_token": processor.image_token,
    }
    counting = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": config.num_prefix_tokens}
    tiling = processor.tiling
    if tiling is None or not prepares_images:
        image_processor = _make_image_processor(processor, pads_to_square=prepares_images)
        return LlavaProcessor(image_processor, tokenizer, **counting, **common)
    if native_type(tiling) == "llava_next":
        image_processor = _make_tiled_image_processor(processor, tiling, LlavaNextImageProcessor)
        return LlavaNextProcessor(image_processor, tokenizer, **counting, **common)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]}, replace_extra_special_tokens=False)
    image_processor = _make_tiled_image_processor(processor, tiling, LlavaOnevisionImageProcessor)
    frames = {key: getattr(image_processor, key) for key in PIXEL_SETTINGS}
    frames["size"] = {"height": tiling.tile_size, "width": tiling.tile_size}
    return LlavaOnevisionProcessor(
        image_processor,
        tokenizer,
        LlavaOnevisionVideoProcessor(**frames),
        video_token=VIDEO_TOKEN,
        num_image_tokens=config.num_patches + config.num_prefix_tokens,
        vision_aspect_ratio=make_aspect_ratio(tiling),
        **common,
    )


def _make_tiled_image_processor(processor: VLMProcessor, tiling: AnyRes, processor_class: Any) -> Any:
    """Return an image processor of a class that cuts tiles, each as large as the encoder's images."""
    steps, side = processor.image_processor, tiling.tile_size
    square = {"height": side, "width": side}
    return processor_class(
        size={"shortest_edge": side} if steps.do_center_crop else square,
        crop_size=square,
        do_center_crop=bool(steps.do_center_crop),
        image_grid_pinpoints=make_grid_pinpoints(tiling),
        **{key: getattr(steps, key) for key in PIXEL_SETTINGS},
    )


def _make_image_processor(processor: VLMProcessor, *, pads_to_square: bool) -> Any:
    """Return the encoder's own image processor, or LLaVA's where images are padded; vLLM reads its `crop_size`."""
    steps = processor.image_processor
    height, width = image_size(steps)
    values = {**steps.to_dict(), "crop_size": {"height": height, "width": width}}
    processor_class = LlavaImageProcessor if pads_to_square and processor.image_mode == "pad" else type(steps)
    if processor_class is LlavaImageProcessor:
        values |= {"do_pad": True, "do_center_crop": bool(steps.do_center_crop)}
    for key in ("image_processor_type", "auto_map", "processor_class"):
        values.pop(key, None)
    return processor_class(**values)


def needs_space_after_special_token(tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    """Return whether a text has its own ids behind a special token only where a blank stands between them."""
    texts = [PROBE_WORD, image_token + PROBE_WORD, f"{image_token} {PROBE_WORD}"]
    alone, directly_behind, after_blank = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return alone != directly_behind[1:] and alone == after_blank[1:]


def find_transparency_difference(theirs: Any, ours: VLMProcessor, format_name: str) -> Iterator[str]:
    """Yield a sentence where what reads an export sees transparent images in another way than our processor.

    With `llava`, transformers' processor prepares images; the original's code ignores their transparency.
    """
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    shown = as_rgb(image, ours.alpha_background)
    if format_name == "llava":
        pixels = [theirs.image_processor(view, return_tensors="pt")["pixel_values"] for view in (image, shown)]
        is_equal = torch.allclose(*pixels, atol=0.05)
        reader = "transformers 5 shows them on white, version 4 ignores transparency"
    else:
        is_equal = shown.tobytes() == image.convert("RGB").tobytes()
        reader = "the original's code ignores transparency"
    if not is_equal:
        yield (
            f"transparent images look different: dataset.alpha_background={ours.alpha_background} has no place in this "
            f"format, and {reader}"
        )
