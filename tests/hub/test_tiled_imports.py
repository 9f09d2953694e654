"""Checkpoints that see pictures in tiles become ones of this framework that compute the same."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel, SiglipImageProcessor

import vlm
from tests.command_line import refusal
from tests.hub.foreign import (
    transformers_llava,
    write_base,
    write_config,
    write_lora,
    write_original,
    write_projector,
    write_shards,
)
from tests.hub.tiles import (
    BATCHES,
    FIVE,
    LIKE,
    SIDE,
    SIXES,
    draw_images,
    in_pixels,
    native,
    native_processor,
    rename_to_transformers_4_51,
    same_answers,
)
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.data.encoding.labels import read_template
from vlm.hub.importing import import_checkpoint
from vlm.models.anyres import AnyRes

KINDS = {
    "next-clip": ("llava_next", "clip", "llama"),
    "next-siglip": ("llava_next", "siglip", "qwen2"),
    "onevision-siglip": ("llava_onevision", "siglip", "qwen2"),
    "onevision-clip": ("llava_onevision", "clip", "llama"),
}


def write_native(parts: Parts, folder: Path, name: str, **fields: Any) -> tuple[Any, Any]:
    """transformers' model and processor, in a folder too."""
    model = native(parts, *KINDS[name], **fields)
    processor = native_processor(parts, model, KINDS[name][2])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("old", [False, True], ids=["now", "4.51"])
@pytest.mark.parametrize("name", KINDS)
def test_transformers_own(parts: Parts, tmp_path: Path, name: str, old: bool):
    theirs, reader = write_native(parts, tmp_path / "theirs", name)
    if old:
        (tmp_path / "theirs" / "model.safetensors").unlink()
        write_shards(tmp_path / "theirs", rename_to_transformers_4_51(theirs), "safetensors", 2)
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    found = vlm.load(tmp_path / "ours", device="cpu")
    kind, encoder, _ = KINDS[name]
    wanted = LIKE[kind]
    assert found.processor.anyres == {
        "grids": wanted.grids, "tile_size": SIDE, "tokens_side": 3, "max_tiles": wanted.max_tiles,
        "tile_several": wanted.tile_several,
    }  # fmt: skip
    assert found.model.config.recipe["anyres"]["grids"] == wanted.grids
    assert type(found.processor.image_processor) is (CLIPImageProcessor if encoder == "clip" else SiglipImageProcessor)
    assert found.processor.chat_template == read_template("chatml")
    for batch in BATCHES:
        text = "what" + " <image> is" * len(BATCHES[batch]) + " in it?"
        given = reader(images=[draw_images(batch)], text=text, return_tensors="pt")
        same_answers(theirs, given, found.model, found.processor(images=draw_images(batch), text=text))


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("{% for message in messages %}[INST] {{ message['content'][0]['text'] }} [/INST]{% endfor %}", "mistral"),
        ("{% for message in messages %}<|im_start|>{{ message['content'][0]['text'] }}{% endfor %}", "chatml"),
        ("{% for message in messages %}USER: {{ message['content'][0]['text'] }}{% endfor %}", "v1"),
    ],
    ids=["mistral", "chatml", "v1"],
)
def test_a_template_for_lists_is_replaced_by_the_packaged_one_that_writes_the_same_turns(
    parts: Parts, tmp_path: Path, text: str, template: str
):
    write_native(parts, tmp_path / "theirs", "next-clip")
    (tmp_path / "theirs" / "chat_template.jinja").write_text(text)
    _, processor = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert processor.chat_template == read_template(template)


# The original's

SIZES = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
"""Widths and heights, in the order of LLaVA-1.6's."""

TURNED = [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
"""The same as rows and columns."""


def write_tiled(parts: Parts, folder: Path, encoder: str = "clip", **fields: Any) -> Any:
    """An original checkpoint and transformers' model with its weights."""
    kind = "llava_next" if fields.get("image_aspect_ratio", "anyres") == "anyres" else "llava_onevision"
    theirs = native(parts, kind, encoder, "vicuna", image_grid_pinpoints=in_pixels(TURNED))
    values = {
        "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": SIZES, **fields,
    }  # fmt: skip
    write_original(folder, parts, theirs, encoder=encoder, **values)
    return theirs


@pytest.mark.parametrize(
    ("encoder", "aspect"), [("clip", "anyres"), ("siglip", "anyres_max_2")], ids=["1.6", "onevision"]
)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_originals(parts: Parts, tmp_path: Path, encoder: str, aspect: str, batch: str):
    theirs = write_tiled(parts, tmp_path / "theirs", encoder, image_aspect_ratio=aspect)
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    found = vlm.load(tmp_path / "ours", device="cpu")
    assert found.processor.chat_template == read_template("v1")
    assert found.processor.tiling == AnyRes(
        TURNED, SIDE, 3, 2 if aspect == "anyres_max_2" else None, aspect == "anyres"
    )
    reader = native_processor(parts, theirs, "vicuna")
    given = reader.image_processor([draw_images(batch)], return_tensors="pt")
    text = "what" + " <image> is" * len(BATCHES[batch]) + " in it?"
    expected = found.processor(images=draw_images(batch), text=text)
    assert found.processor.image_token_id == theirs.config.image_token_id
    same_answers(theirs, {**expected_ids(expected), **given}, found.model, expected)


def expected_ids(inputs: Any) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def test_an_adapter_brings_its_newline(parts: Parts, tmp_path: Path):
    theirs = native(parts, "llava_next", "clip", "vicuna", image_grid_pinpoints=in_pixels(TURNED))
    theirs.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(parts.encoder("clip")).state_dict())
    base = write_base(tmp_path / "base", parts, theirs)
    write_lora(tmp_path / "lora", parts, theirs, base)
    tiles = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": SIZES}
    write_config(tmp_path / "lora", parts, **tiles)
    import_checkpoint(str(tmp_path / "lora"), tmp_path / "ours", base_model=str(base))
    found = vlm.load(tmp_path / "ours", device="cpu")
    given = native_processor(parts, theirs, "vicuna").image_processor([draw_images("one")], return_tensors="pt")
    expected = found.processor(images=draw_images("one"), text="what <image>")
    same_answers(theirs, {**expected_ids(expected), **given}, found.model, expected)
    write_projector(tmp_path / "projector", parts, theirs)
    write_config(tmp_path / "projector", parts, **tiles)
    refusal_message = refusal("import", str(tmp_path / "projector"), str(tmp_path / "out"), "--base-model", str(base))
    assert "the source lacks 1 weights, such as image_newline.weight" in refusal_message


@pytest.mark.parametrize(
    ("written", "grids"),
    [
        (SIZES, TURNED),
        ("[(24, 48), (48, 24), (48, 48), (72, 24), (24, 72)]", TURNED),
        ("(1x2),(2x1),(2x2),(3x1),(1x3)", TURNED),
        ("(1x1),...,(6x6)", [[rows, columns] for columns in range(1, 7) for rows in range(1, 7)]),
    ],
    ids=["list", "list in a string", "tiles", "range"],
)
def test_how_the_original_writes_its_grids(parts: Parts, tmp_path: Path, written: Any, grids: list):
    write_tiled(parts, tmp_path / "theirs", image_grid_pinpoints=written)
    _, processor = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert processor.anyres["grids"] == grids


def chosen(width: int, height: int, sizes: list[list[int]]) -> list[int]:
    """The size that the original's rule takes: most pixels of the picture, then least waste, then the first."""

    def worth(size: list[int]) -> tuple[int, int]:
        scale = min(size[0] / width, size[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    return max(sizes, key=worth)


def test_widths_come_first_in_the_original(parts: Parts, tmp_path: Path):
    """A small square takes its first size: narrow and high there, wide and low in transformers' version of it."""
    write_tiled(parts, tmp_path / "theirs")
    _, processor = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    draw = random.Random(0)
    shapes = [(draw.randint(1, 200), draw.randint(1, 200)) for _ in range(500)]
    for width, height in [(20, 20), (24, 24), *shapes]:
        rows, columns = processor.tiling.grid((height, width))
        assert [columns * SIDE, rows * SIDE] == chosen(width, height, SIZES), (width, height)
    assert processor.tiling.grid((20, 20)) == (2, 1)


@pytest.mark.parametrize("resample", [2, 3])
def test_the_originals_tiles_are_resized_bicubically_by_pillow(parts: Parts, tmp_path: Path, resample: int):
    """Whatever the encoder's own image processor does; torchvision is off by a step in 255 at most."""
    theirs = write_tiled(parts, tmp_path / "theirs")
    encoder = tmp_path / "clip"
    encoder.mkdir()
    for file in parts.encoder("clip").iterdir():
        (encoder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((encoder / "preprocessor_config.json").read_text())
    (encoder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": resample}))
    _, processor = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours", vision_tower=str(encoder))
    image = picture(0, (100, 31))
    width, height = chosen(*image.size, SIZES)
    scale = min(width / image.width, height / image.height)
    small = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)))
    whole = Image.new("RGB", (width, height))
    whole.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    boxes = [(x, y, x + SIDE, y + SIDE) for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
    expected = [image.resize((SIDE, SIDE)), *(whole.crop(box) for box in boxes)]
    seen = processor.image_inputs([image])["pixel_values"].int()
    flat = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3) for one in expected]
    assert (seen - torch.stack(flat).permute(0, 3, 1, 2).int()).abs().max() <= 1
    assert theirs.config.image_grid_pinpoints == in_pixels(TURNED)


# What is refused

REFUSED = {
    "flat": ({"mm_patch_merge_type": "flat"}, "are imported with mm_patch_merge_type=spatial_unpad"),
    "no merge type": ({"mm_patch_merge_type": None}, "are imported with mm_patch_merge_type=spatial_unpad"),
    "spatial": ({"mm_patch_merge_type": "spatial"}, "are imported with mm_patch_merge_type=spatial_unpad"),
    "pooled": ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "are imported with mm_patch_merge_type=spatial_unpad"),
    "no tiles": ({"image_aspect_ratio": "pad"}, "one square an image is imported with mm_patch_merge_type=flat"),
    "highres": ({"image_aspect_ratio": "highres"}, "imported are square, pad, anyres and anyres_max_<N>"),
    "no limit": ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio=anyres_max_0; imported is anyres_max_<N>"),
    "no grids": ({"image_grid_pinpoints": None}, "image_grid_pinpoints=None; expected a list of sizes in pixels"),
    "no multiple": (
        {"image_grid_pinpoints": [[24, 40]]},
        "[24, 40] is not a multiple of the visual encoder's 24 pixels",
    ),
    "no list": ({"image_grid_pinpoints": "a b"}, "imported are a list of sizes, and (1x1),...,(6x6)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_originals_that_are_refused(parts: Parts, tmp_path: Path, case: str):
    fields, reason = REFUSED[case]
    values = {
        "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": SIZES, **fields,
    }  # fmt: skip
    write_original(tmp_path / "theirs", parts, transformers_llava(parts), **values)
    assert reason in refusal("import", str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_natives_that_are_refused(parts: Parts, tmp_path: Path):
    write_native(parts, tmp_path / "theirs", "onevision-clip")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())

    def refusal_message(**fields: Any) -> str:
        (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **fields}))
        return refusal("import", str(tmp_path / "theirs"), str(tmp_path / "ours"))

    assert "vision_aspect_ratio=anyres; imported is anyres_max_<N>" in refusal_message(vision_aspect_ratio="anyres")
    assert "of its model, but [[24, 24], " in refusal_message(image_grid_pinpoints=in_pixels(FIVE))
    assert "model.visual_encoder.feature_strategy=patch" in refusal_message(vision_feature_select_strategy="full")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    said_of_pad = refusal("import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--image-mode", "pad")
    assert "image_mode=pad: with model.anyres, dataset.image_mode=square is needed" in said_of_pad


def test_an_image_processor_with_two_sizes_is_refused(parts: Parts, tmp_path: Path):
    model = native(parts, "llava_next", "clip", "llama")
    model.save_pretrained(tmp_path / "theirs")
    processor = native_processor(parts, model, "llama", size={"shortest_edge": 30})
    processor.save_pretrained(tmp_path / "theirs")
    refusal_message = refusal("import", str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert "it sees the whole image in (30, 30) pixels and tiles of 24; needed is one size" in refusal_message
    processor.image_processor = CLIPImageProcessor()
    processor.save_pretrained(tmp_path / "theirs")
    refusal_message = refusal("import", str(tmp_path / "theirs"), str(tmp_path / "ours"))
    assert "is a CLIPImageProcessor, which cuts no tiles" in refusal_message


def test_what_is_imported_is_said_and_can_be_asked(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_native(parts, tmp_path / "theirs", "onevision-siglip")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    refusal_message = capsys.readouterr().out
    assert (
        f"9 tokens a tile, images in {len(SIXES)} grids of tiles, shrunk to about 2 tiles, torch.float32"
        in refusal_message
    )
    picture().save(tmp_path / "picture.png")
    words = ["--image", str(tmp_path / "picture.png"), "--prompt", "What?", "--max-new-tokens", "3"]
    main(["generate", str(tmp_path / "ours"), *words])
