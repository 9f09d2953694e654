"""LLaVA-NeXT and LLaVA-OneVision made of tiny parts: transformers' own, the original's, and ours."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from tests.hub.foreign import tokenizer_with_image
from tests.tiny_parts import Parts, picture
from vlm.assembly.compose import build_model, compose
from vlm.config.model_schema import AnyResConfig
from vlm.models import VLMForConditionalGeneration, VLMProcessor

SIDE = 24
"""What the tiny encoders see."""

FIVE = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
SIXES = [[rows, columns] for rows in range(1, 7) for columns in range(1, 7)]
LIKE = {
    "llava_next": AnyResConfig(FIVE, tile_several=True),
    "llava_onevision": AnyResConfig(SIXES, max_tiles=2),
}
"""Rows and columns of tiles."""


def in_pixels(grids: list[list[int]]) -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for rows, columns in grids]


def native(parts: Parts, kind: str, encoder: str, language_model: str, **fields: Any) -> Any:
    """transformers' model with random weights; image and video tokens stand behind the language model's vocabulary."""
    text = AutoConfig.from_pretrained(parts.language_model(language_model))
    tokens = {"image_token_index": text.vocab_size}
    if kind == "llava_onevision":
        tokens["video_token_index"] = text.vocab_size + 1
        fields = {"vision_aspect_ratio": f"anyres_max_{LIKE[kind].max_tiles}", **fields}
    text.vocab_size += 64
    configs, models = (
        {"llava_next": LlavaNextConfig, "llava_onevision": LlavaOnevisionConfig},
        {"llava_next": LlavaNextForConditionalGeneration, "llava_onevision": LlavaOnevisionForConditionalGeneration},
    )
    config = configs[kind](
        vision_config=AutoConfig.from_pretrained(parts.encoder(encoder)), text_config=text, **tokens, **{
            "vision_feature_layer": -2, "image_grid_pinpoints": in_pixels(LIKE[kind].grids or []),
            "vision_feature_select_strategy": "default" if encoder == "clip" else "full", **fields,
        },
    )  # fmt: skip
    model = models[kind](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def native_processor(parts: Parts, model: Any, language_model: str, **options: Any) -> Any:
    """transformers' processor for `native`."""
    tokenizer = tokenizer_with_image(parts.language_model(language_model))
    pixels = {"image_grid_pinpoints": model.config.image_grid_pinpoints, **options}
    siglip = model.config.vision_config.model_type == "siglip_vision_model"
    if siglip:
        pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    strategy = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    if model.config.model_type == "llava_next":
        images = LlavaNextImageProcessor(
            **{"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **pixels}
        )
        return LlavaNextProcessor(
            images, tokenizer, patch_size=8, num_additional_image_tokens=int(not siglip), **strategy
        )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    size = {"size": {"height": SIDE, "width": SIDE}}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**{**size, **pixels}), tokenizer, LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=9 + (not siglip), vision_aspect_ratio=model.config.vision_aspect_ratio, **strategy,
    )  # fmt: skip


def rename_to_transformers_4_51(model: Any) -> dict[str, Tensor]:
    """The weights as the checkpoints on the Hub call them."""
    names = {
        "model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "model.image_newline": "image_newline",
    }  # fmt: skip
    found = {}
    for name, value in model.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        found[names[prefix] + name.removeprefix(prefix)] = value
    if model.config.tie_word_embeddings:
        del found["language_model.lm_head.weight"]
    return found


def ours(
    parts: Parts, folder: Path, names: tuple[str, str], anyres: AnyResConfig, template: str = "chatml", **recipe: Any
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """A checkpoint of ours in `folder`, every weight random."""
    wanted = parts.recipe(*names, **{"layer": -2, **recipe})
    wanted.anyres = anyres
    config, processor = compose(wanted, template, None)
    model = build_model(wanted, config, processor, torch.float32, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


BATCHES = {"one": [(40, 30)], "strip": [(100, 10)], "small": [(9, 9)], "several": [(40, 30), (10, 90), (50, 50)]}
"""Widths and heights of the pictures of a sample."""


def draw_images(name: str) -> list[Any]:
    return [picture(number, shape) for number, shape in enumerate(BATCHES[name])]


def views(given: dict[str, Any], numbers: Tensor) -> Tensor:
    """transformers' pixels without the padding that makes pictures of one batch equally long."""
    found = [seen[:number] for seen, number in zip(given["pixel_values"], numbers.tolist(), strict=True)]
    return torch.cat(found)


def same_answers(theirs: Any, given: Any, model: VLMForConditionalGeneration, expected: Any) -> None:
    """Ids, pixels, logits and greedy tokens.

    Args:
        theirs: transformers' model.
        given: inputs of its own processor.
        model: ours.
        expected: inputs of our processor.
    """
    assert given["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(views(given, expected["image_views"]), expected["pixel_values"])
    with torch.no_grad():
        mine, other = model(**expected).logits, theirs(**given).logits
    assert other.std() > 1e-2, "logits that tell something"
    rows = theirs.config.image_token_id
    assert torch.allclose(mine[..., :rows], other[..., :rows], atol=1e-5)
    if mine.shape != other.shape:
        return  # new rows differ: means here, random there
    assert torch.allclose(mine, other, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(**given, **options), model.generate(**expected, **options))
