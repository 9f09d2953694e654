"""Models that see pictures in tiles, in other forms: what loads them computes the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from tests.command_line import refusal
from tests.hub.test_exporting import KEYS, WITHIN_SENTENCES, weights
from tests.hub.tiles import BATCHES, FIVE, LIKE, SIDE, SIXES, draw_images, in_pixels, ours, same_answers
from tests.tiny_parts import Parts
from vlm.config.model_schema import AnyResConfig
from vlm.hub.exporting import export_checkpoint
from vlm.hub.importing import import_checkpoint
from vlm.hub.tiles import make_aspect_ratio, native_type
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models.anyres import AnyRes

NEXT, ONEVISION = LIKE["llava_next"], LIKE["llava_onevision"]

CASES: dict[str, tuple[tuple[str, str], AnyResConfig, dict[str, Any]]] = {
    "next-clip": (("clip", "vicuna"), NEXT, {"template": "v1"}),
    "next-siglip": (("siglip", "tied_llama"), NEXT, {"layer": -1}),
    "next-limit-unreached": (("clip", "mistral"), replace(NEXT, max_tiles=4), {"template": "mistral"}),
    "onevision-siglip": (("siglip", "qwen2"), ONEVISION, {}),
    "onevision-clip": (("clip", "llama"), ONEVISION, {"template": "llama3"}),
    "onevision-no-limit": (("siglip", "llama"), AnyResConfig(FIVE), {"options": {"activation": "silu", "bias": False}}),
}

CLASSES = {
    "next": (LlavaNextForConditionalGeneration, LlavaNextProcessor),
    "onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor),
}


def save(parts: Parts, folder: Path, case: str) -> tuple[Any, Any]:
    names, anyres, options = CASES[case]
    return ours(parts, folder, names, anyres, **options)


@pytest.mark.parametrize("case", CASES)
def test_transformers_answers_the_same(parts: Parts, tmp_path: Path, case: str):
    """Ids and pixels of its own processor, logits, and greedy tokens."""
    model, processor = save(parts, tmp_path / "ours", case)
    expected = [f"conversations {WITHIN_SENTENCES}"] if case == "next-clip" else []  # the one with Vicuna's tokenizer
    assert export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava") == expected
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    reader = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert (type(theirs), type(reader)) == CLASSES[case.partition("-")[0]]
    assert not any(info.values()), info
    for batch, shapes in BATCHES.items():
        content = [{"type": "image", "image": one} for one in draw_images(batch)]
        given = reader.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        turns = [[user_turn("What is this?", len(shapes))]]
        expected = VisionLanguageModel(model, processor).inputs(turns, [draw_images(batch)])
        same_answers(theirs.eval(), given, model, expected)


@pytest.mark.parametrize("form", KEYS)
def test_the_names_of_weights_are_held(parts: Parts, tmp_path: Path, form: str):
    ours(parts, tmp_path / "ours", ("clip", "llama"), NEXT, "v1")
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", form)
    newline = "image_newline" if form == "llava" else "model.image_newline"
    assert set(weights(tmp_path / "theirs")) == KEYS[form] | {newline}


@pytest.mark.parametrize("case", ["next-clip", "onevision-siglip"])
def test_fields_that_others_read(parts: Parts, tmp_path: Path, case: str):
    _, processor = save(parts, tmp_path / "ours", case)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    grids = FIVE if case == "next-clip" else SIXES
    expected: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "image_token_index": 480,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "image_grid_pinpoints": in_pixels(grids), "image_seq_length": 9,
    }  # fmt: skip
    if case == "onevision-siglip":
        expected |= {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
            "image_token_index": 320, "video_token_index": 321, "vision_aspect_ratio": "anyres_max_2",
            "vision_feature_select_strategy": "full", "tie_word_embeddings": True,
        }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert "<video>" not in processor.tokenizer.get_vocab()
    reader = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert dict(reader.image_processor.crop_size) == {"height": SIDE, "width": SIDE}
    assert reader.image_processor.image_grid_pinpoints == in_pixels(grids)
    if case == "onevision-siglip":
        assert reader.video_token_id == 321
        assert reader.vision_aspect_ratio == "anyres_max_2"
        assert list(reader.video_processor.image_mean) == [0.5] * 3
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert files == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("form", KEYS)
@pytest.mark.parametrize("case", ["next-clip", "onevision-siglip", "onevision-clip", "next-limit-unreached"])
def test_there_and_back_is_bit_equal(parts: Parts, tmp_path: Path, form: str, case: str):
    _, processor = save(parts, tmp_path / "ours", case)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", form, largest_shard=30_000)
    _, back = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "back")
    before, after = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert back.chat_template == processor.chat_template
    limit = None if case == "next-limit-unreached" else processor.tiling.max_tiles
    assert back.tiling == replace(processor.tiling, max_tiles=limit)
    for batch, shapes in BATCHES.items():
        expected, seen = processor.image_inputs(draw_images(batch)), back.image_inputs(draw_images(batch))
        assert all(torch.equal(seen[name], value) for name, value in expected.items())
        assert torch.equal(back.normalise(seen["pixel_values"]), processor.normalise(expected["pixel_values"]))
        sizes = [(height, width) for width, height in shapes]
        assert (
            back.tokenize("a <image> b" * len(sizes), (), sizes)[0]
            == processor.tokenize("a <image> b" * len(sizes), (), sizes)[0]
        )


@pytest.mark.parametrize(("case", "aspect"), [("next-clip", "anyres"), ("onevision-siglip", "anyres_max_2")])
def test_the_original_layouts_fields(parts: Parts, tmp_path: Path, case: str, aspect: str):
    save(parts, tmp_path / "ours", case)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", "llava-original")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    grids = FIVE if case == "next-clip" else SIXES
    expected = {
        "image_aspect_ratio": aspect, "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in in_pixels(grids)],
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("max_tiles", "tile_several", "kind", "aspect"),
    [
        (None, True, "llava_next", "anyres"), (4, True, "llava_next", "anyres"), (3, True, None, "anyres_max_3"),
        (None, False, "llava_onevision", "anyres_max_4"), (2, False, "llava_onevision", "anyres_max_2"),
    ],
)  # fmt: skip
def test_which_model_has_such_tiles(max_tiles: int | None, tile_several: bool, kind: str | None, aspect: str):
    anyres = AnyRes(FIVE, SIDE, 3, max_tiles, tile_several)
    assert (native_type(anyres), make_aspect_ratio(anyres)) == (kind, aspect)
    if not tile_several:  # a limit that no grid reaches changes nothing
        shapes = [(1, 500), (500, 1), (400, 400), (30, 31)]
        limited = replace(anyres, max_tiles=int(aspect.removeprefix("anyres_max_")))
        assert [limited.image_tokens([one]) for one in shapes] == [anyres.image_tokens([one]) for one in shapes]


def test_all_that_hinders_is_said_at_once(parts: Parts, tmp_path: Path):
    ours(parts, tmp_path / "a", ("siglip", "llama"), replace(ONEVISION, tile_several=True), options={"num_layers": 3})
    said = refusal("export", str(tmp_path / "a"), str(tmp_path / "out"), "--format", "llava")
    assert "model.anyres.tile_several=true with max_tiles=2: LLaVA-NeXT tiles each of several images" in said
    assert "num_layers=3" in said
    settings = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    settings["image_processor"]["resample"] = 2
    (tmp_path / "a" / "processor_config.json").write_text(json.dumps(settings))
    said = refusal("export", str(tmp_path / "a"), str(tmp_path / "out"), "--format", "llava-original")
    assert "with resample=2: the original resizes bicubically (3)" in said
    assert "model.anyres.tile_several=true with max_tiles=2" in said


def test_onevision_needs_a_row_for_videos(parts: Parts, tmp_path: Path):
    _, processor = ours(parts, tmp_path / "ours", ("siglip", "llama"), ONEVISION)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(processor.tokenizer)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    said = refusal("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "llava")
    assert "a vocabulary of 321 with no row to spare: LLaVA-OneVision has a <video>" in said
