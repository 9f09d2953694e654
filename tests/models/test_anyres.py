"""Images in tiles: the tokens, pixels, logits and gradients of transformers' LLaVA-NeXT and LLaVA-OneVision."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    CLIPVisionModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    SiglipVisionModel,
)

import vlm.config
from tests.tiny_parts import Parts, picture
from vlm.assembly.compose import build_model, compose
from vlm.config.model_schema import AnyResConfig
from vlm.models.anyres import AnyRes, first_mismatched_row

FOLDER = Path(vlm.config.__file__).parent / "model" / "anyres"
DOCS = Path(__file__).parents[2] / "docs" / "anyres.md"


def shipped(name: str) -> dict[str, Any]:
    """A shipped YAML."""
    found: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return found


NEXT = AnyRes(**shipped("llava-next"), tile_size=336, tokens_side=24)
"""CLIP-L/14 at 336 pixels."""
ONEVISION = AnyRes(**shipped("llava-onevision"), tile_size=384, tokens_side=27)
"""SigLIP-so400m/14 at 384 pixels."""


def pinpoints(anyres: AnyRes) -> list[list[int]]:
    """The grids as transformers has them, in pixels."""
    return [[rows * anyres.tile_size, columns * anyres.tile_size] for rows, columns in anyres.grids]


# Counts


def test_the_papers_token_counts():
    assert NEXT.image_tokens([(256, 256)]) == [1176]
    assert max(NEXT.num_tokens(size, 2) for size in sizes()) == 2928
    assert ONEVISION.image_tokens([(256, 256)]) == [1485]
    assert ONEVISION.image_tokens([(672, 672)]) == [3699]
    assert ONEVISION.image_tokens([(2304, 2304)]) == [7371]
    assert max(ONEVISION.num_tokens(size, 2) for size in sizes()) <= 8765  # up to 1.1 times too long, nothing shrinks
    assert ONEVISION.image_tokens([None] * 32) == [196] * 32
    assert ONEVISION.image_tokens([(256, 256), (1000, 500)]) == [730, 730]
    assert ONEVISION.image_tokens([(256, 256), None]) == [1485, 196]


def sizes() -> list[tuple[int, int]]:
    """Heights and widths: strips, small ones, multiples of tiles and their neighbours, and many at random."""
    draw = random.Random(0)
    edges = [1, 2, 13, 14, 15, 27, 30, 256, 335, 336, 337, 383, 384, 385, 672, 1000, 1008, 2304, 5000]
    free = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(2000)]
    return [*((height, width) for height in edges for width in edges), *free]


def test_counts_equal_transformers_llava_next(parts: Parts):
    theirs = LlavaNextProcessor(
        LlavaNextImageProcessor(image_grid_pinpoints=pinpoints(NEXT), size={"shortest_edge": 336}),
        parts.processor().tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    expected = theirs._get_num_multimodal_tokens(image_sizes=sizes())["num_image_tokens"]
    assert [NEXT.image_tokens([size])[0] for size in sizes()] == expected


def test_counts_equal_transformers_llava_onevision(parts: Parts):
    theirs = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(), parts.processor().tokenizer, LlavaOnevisionVideoProcessor(),
        num_image_tokens=729, vision_feature_select_strategy="full",
    )  # fmt: skip
    assert LlavaOnevisionImageProcessor().image_grid_pinpoints == pinpoints(ONEVISION)
    expected = theirs._get_num_multimodal_tokens(image_sizes=sizes())["num_image_tokens"]
    assert [ONEVISION.image_tokens([size])[0] for size in sizes()] == expected


def test_the_module_lays_out_what_is_counted():
    """Strips of which nothing but padding is left in the tiles' tokens included."""
    for anyres in (NEXT, ONEVISION):
        for size in [(1, 1000), (1000, 1), (1, 5000), (30, 5000), (333, 1007), (2304, 2304), (256, 256), (17, 18)]:
            views = anyres.num_views([size])[0]
            grid = anyres.stitch_tiles(torch.zeros(views - 1, anyres.tokens_side**2, 2), size)
            rows, columns = anyres.limit_size(anyres.unpadded_size(size))
            assert grid.shape == (2, rows, columns)
            assert anyres.num_tokens(size, views) == anyres.tokens_side**2 + rows * (columns + 1)


def test_the_table_in_the_documentation_is_what_is_counted():
    rows = ["| image (width x height) | `llava-next`, CLIP 336 | `llava-onevision`, SigLIP 384 |", "|---|---|---|"]
    for width, height in [(256, 256), (336, 336), (640, 480), (672, 672), (1280, 720), (1000, 300), (2304, 2304)]:
        counts = []
        for anyres in (NEXT, ONEVISION):
            grid = anyres.grid((height, width))
            counts.append(f"{anyres.image_tokens([(height, width)])[0]:,} ({grid[0]} x {grid[1]} tiles)")
        rows.append(f"| {width} x {height} | {' | '.join(counts)} |")
    for name, seen in [("each of several images", [(9, 9), (9, 9)]), ("each frame of a video", [None])]:
        rows.append(f"| {name} | {NEXT.image_tokens(seen)[0]} | {ONEVISION.image_tokens(seen)[0]} |")
    table = "\n".join(rows)
    assert table in DOCS.read_text(encoding="utf-8"), table


@pytest.mark.parametrize(
    ("rows", "images", "row"),
    [([5, 0, 7], [2, 3, 7], None), ([5, 7], [2, 3, 7, 1], 1), ([5, 6], [2, 3, 7], 1), ([4, 8], [2, 3, 7], 0),
     ([], [], None), ([3], [], 0)],
)  # fmt: skip
def test_the_first_row_that_does_not_fit(rows, images, row):
    assert first_mismatched_row(rows, images) == row


# Pixels

SHAPES = [(40, 30), (30, 40), (24, 24), (100, 10), (7, 90), (61, 59), (300, 200)]
"""Widths and heights."""

TINY = {"grids": [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]}
SIX = {"grids": [[rows, columns] for rows in range(1, 7) for columns in range(1, 7)], "max_tiles": 2}


def composed(parts: Parts, encoder: str, anyres: dict[str, Any], **recipe: Any) -> tuple[Any, Any]:
    """A tiny model and its processor that see images in tiles."""
    wanted = parts.recipe(encoder, **recipe)
    wanted.anyres = AnyResConfig(**anyres)
    config, processor = compose(wanted, None, None)
    return build_model(wanted, config, processor, torch.float32, seed=0).eval(), processor


@pytest.fixture(scope="module")
def like_next(parts: Parts) -> tuple[Any, Any]:
    """CLIP read at layer -2, five grids."""
    return composed(parts, "clip", {**TINY, "tile_several": True}, layer=-2)


@pytest.fixture(scope="module")
def like_onevision(parts: Parts) -> tuple[Any, Any]:
    """SigLIP read at layer -1, grids up to 6 x 6, shrunk to 2 tiles."""
    return composed(parts, "siglip", SIX, layer=-1)


def list_grids_in_pixels(processor: Any) -> list[list[int]]:
    return pinpoints(AnyRes(**processor.anyres))


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_equal_transformers_llava_next(like_next, shape):
    processor = like_next[1]
    theirs = LlavaNextImageProcessor(
        image_grid_pinpoints=list_grids_in_pixels(processor), size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
    )  # fmt: skip
    expected = theirs([picture(0, shape)], return_tensors="pt")
    seen = processor.image_inputs([picture(0, shape)])
    assert seen["pixel_values"].dtype == torch.uint8
    assert torch.equal(processor.normalise(seen["pixel_values"]), expected["pixel_values"][0])
    assert torch.equal(seen["image_sizes"], expected["image_sizes"])
    assert seen["image_views"].tolist() == [len(seen["pixel_values"])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("several", [False, True])
def test_pixels_equal_transformers_llava_onevision(like_onevision, shape, several: bool):
    processor = like_onevision[1]
    own = processor.image_processor
    theirs = LlavaOnevisionImageProcessor(
        image_grid_pinpoints=list_grids_in_pixels(processor), size={"height": 24, "width": 24},
        image_mean=own.image_mean, image_std=own.image_std, resample=own.resample,
    )  # fmt: skip
    images: Any = [picture(number, shape) for number in range(1 + several)]
    expected = theirs([images], return_tensors="pt")["pixel_values"]
    seen = processor.image_inputs(images)
    assert torch.equal(processor.normalise(seen["pixel_values"]), expected.flatten(0, 1))
    assert seen["image_views"].tolist() == [1, 1] if several else [len(expected[0])]


def test_decoded_tensors_give_the_pixels_of_images(like_next):
    processor = like_next[1]
    images = [picture(0, (50, 31)), picture(1, (20, 90))]
    tensors = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in images]
    tensors = [flat.view(one.height, one.width, 3).permute(2, 0, 1) for flat, one in zip(tensors, images, strict=True)]
    expected, seen = processor.image_inputs(images), processor.image_inputs(tensors)
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


def test_frames_of_videos_are_one_pooled_view_and_no_images(like_onevision):
    processor = like_onevision[1]
    images = [picture(number) for number in range(3)]
    seen = processor.image_inputs(images, [None, (30, 40), None])
    views = seen["image_views"].tolist()
    assert views[0] == views[2] == 0
    assert views[1] > 1
    assert len(seen["pixel_values"]) == views[1] + 2
    squashed = processor.image_processor([images[0]], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.normalise(seen["pixel_values"][:1]), squashed)


# Logits and gradients


def copy_into_transformers(ours: Any, processor: Any, kind: str, encoder: Any) -> Any:
    """transformers' model with the weights of ours."""
    grids = {"image_grid_pinpoints": list_grids_in_pixels(processor), "text_config": ours.config.text_config}
    grids |= {"vision_config": encoder.config, "image_token_index": ours.config.image_token_id}
    if kind == "next":
        model: Any = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**grids, vision_feature_layer=-2, vision_feature_select_strategy="default")
        )
    else:
        config = LlavaOnevisionConfig(
            **grids, video_token_index=3, vision_feature_layer=-1, vision_feature_select_strategy="full",
            vision_aspect_ratio=f"anyres_max_{SIX['max_tiles']}",
        )  # fmt: skip
        model = LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(ours.language_model.model.state_dict())
    model.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    model.model.multi_modal_projector.linear_1.load_state_dict(ours.connector.layers[0].state_dict())
    model.model.multi_modal_projector.linear_2.load_state_dict(ours.connector.layers[2].state_dict())
    model.model.image_newline.data.copy_(ours.image_newline.weight.data)
    return model.eval()


BATCHES = {
    "one picture": [[(40, 30)]],
    "several pictures": [[(40, 30), (10, 90), (50, 50)]],
    "mixed rows": [[(40, 30)], [], [(100, 10), (30, 30)], [(24, 70)]],
}
"""The widths and heights of each row's images."""


def batch(processor: Any, rows: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    """Rows of text with images in it, padded on the right."""
    images = [picture(number, shape) for number, shape in enumerate(shape for row in rows for shape in row)]
    texts = ["what" + " a <image> cat" * len(row) + " mat" * (3 + place) for place, row in enumerate(rows)]
    return dict(processor(images=images or None, text=texts, padding_side="right"))


def reference_features(inputs: dict[str, torch.Tensor], rows: list[list[tuple[int, int]]], kind: str) -> dict[str, Any]:
    """The same inputs as transformers' models take them: views of each image, padded to as many."""
    views = inputs["pixel_values"].split(inputs["image_views"].tolist())
    padded = torch.nn.utils.rnn.pad_sequence(list(views), batch_first=True)
    extra = {} if kind == "next" else {"batch_num_images": [len(row) for row in rows if row]}
    rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_views")}
    return {**rest, "pixel_values": padded, **extra}


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_logits_and_gradients_equal_transformers(parts: Parts, like_next, like_onevision, kind: str, rows):
    ours, processor = like_next if kind == "next" else like_onevision
    folder = parts.encoder("clip" if kind == "next" else "siglip")
    encoder = (CLIPVisionModel if kind == "next" else SiglipVisionModel).from_pretrained(folder)
    theirs = copy_into_transformers(ours, processor, kind, encoder)
    inputs = batch(processor, rows)
    ours.zero_grad()
    mine, other = ours(**inputs).logits, theirs(**reference_features(inputs, rows, kind)).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(mine[real], other[real], atol=1e-5)
    for logits in (mine, other):
        (logits[real] ** 2).mean().backward()
    pairs = {
        "connector.layers.0.weight": "model.multi_modal_projector.linear_1.weight",
        "connector.layers.2.bias": "model.multi_modal_projector.linear_2.bias",
        "image_newline.weight": "model.image_newline",
    }
    own, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs |= {f"visual_encoder.{name}": f"model.vision_tower.{name}" for name, _ in encoder.named_parameters()}
    pairs |= {f"language_model.{name}": name.replace("model.", "model.language_model.", 1)
              for name, _ in ours.language_model.named_parameters()}  # fmt: skip
    compared = 0
    for name, other_name in pairs.items():
        if name in own and own[name].grad is not None:
            assert torch.allclose(own[name].grad, expected[other_name].grad, atol=1e-5), name
            compared += 1
    assert compared > 50
    assert own["image_newline.weight"].grad.abs().max() > 0


def test_pooled_frames_equal_transformers_llava_onevision(parts: Parts, like_onevision):
    ours, processor = like_onevision
    theirs = copy_into_transformers(
        ours, processor, "onevision", SiglipVisionModel.from_pretrained(parts.encoder("siglip"))
    )
    frames = [picture(number) for number in range(3)]
    inputs = processor.image_inputs(frames, [None] * 3)
    pixels = processor.normalise(inputs["pixel_values"])
    with torch.no_grad():
        expected = theirs.get_video_features(pixels[None]).pooler_output.flatten(0, -2)
        seen = ours.image_newline(ours.get_image_features(pixels), [(30, 40)] * 3, [0, 0, 0])
    assert torch.allclose(seen, expected[: len(seen)], atol=1e-6)
    assert len(seen) == 3 * 4  # 3 x 3 tokens become 2 x 2
