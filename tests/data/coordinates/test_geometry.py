"""What a view says is where a painted box lands in the pixels that the model gets."""

import random

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.models.llava import LlavaImageProcessor

from tests.families.tiny_families import TINY
from tests.tiny_parts import Parts
from vlm.data.coordinates.geometry import ImageView, make_views
from vlm.data.processor import Processor
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES
from vlm.models.anyres import AnyRes
from vlm.models.processing_vlm import VLMProcessor

SIZES = [(60, 90), (90, 60), (40, 40), (33, 71)]
SIDE = 64


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A white box on black."""
    image = Image.new("RGB", (size[1], size[0]))
    image.paste((255, 255, 255), box)
    return image


def bright_box(pixels: Tensor) -> tuple[float, ...]:
    """Where the brightest pixels are in `(3, height, width)`, as shares of its sides."""
    values = pixels[0].numpy()
    bright = values > (values.max() + values.min()) / 2
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    height, width = values.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def family(name: str, image_processor: object = None) -> FamilyProcessor:
    native = TINY[name].processor()
    if image_processor is not None:
        native.image_processor = image_processor
    return FamilyProcessor(native, FAMILIES[TINY[name].model_type])


def composed(parts: Parts, image_mode: str, image_processor: object) -> VLMProcessor:
    made = parts.processor(image_mode=image_mode)
    return VLMProcessor(image_processor, made.tokenizer, made.chat_template, image_mode=image_mode)


def crops() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def squashes() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": SIDE, "width": SIDE})


def pads() -> LlavaImageProcessor:
    return LlavaImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True
    )  # fmt: skip


MAKERS = {
    "composed, cropped": lambda parts: composed(parts, "square", crops()),
    "composed, squashed": lambda parts: composed(parts, "square", squashes()),
    "composed, padded": lambda parts: composed(parts, "pad", crops()),
    "llava": lambda parts: family("llava-1.5", crops()),
    "llava, padded": lambda parts: family("llava-1.5", pads()),
    "llava-interleave": lambda parts: family("llava-interleave", squashes()),
    "paligemma": lambda parts: family("paligemma"),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_painted_boxes_land_where_the_view_says(name: str, size: tuple[int, int], parts: Parts):
    processor: Processor = MAKERS[name](parts)
    if name == "paligemma":
        processor.image_processor.size = {"height": SIDE, "width": SIDE}
    (view,), (height, width) = make_views(processor, [size]), size
    middle = (width * 3 // 8, height * 3 // 8, width * 5 // 8, height * 5 // 8)  # within every crop
    pixels = processor.image_processor([painted(size, middle)], return_tensors="pt")["pixel_values"][0]
    if isinstance(processor, VLMProcessor):
        pixels = processor.pixel_values([painted(size, middle)])[0]
    assert tuple(pixels.shape[1:]) == (view.seen_height, view.seen_width)
    landed = bright_box(pixels)
    shares = view.to_shares(tuple(map(float, middle)))
    assert np.abs(np.array(landed) - shares).max() <= 1.5 / SIDE
    assert np.allclose(view.to_pixels(shares), middle)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_size_that_qwen_sees_is_that_of_its_patches(name: str):
    processor = family(name)
    chance = random.Random(name)
    for height, width in [
        (30, 40),
        (4, 90),
        (200, 9),
        *((chance.randint(3, 99), chance.randint(3, 99)) for _ in range(9)),
    ]:
        (view,) = make_views(processor, [(height, width)])
        grid = processor.image_inputs([Image.new("RGB", (width, height))])["image_grid_thw"][0].tolist()
        assert view.is_sized
        assert (view.seen_height, view.seen_width) == (grid[1] * 4, grid[2] * 4)
        assert view.to_pixels((1.0, 1.0)) == pytest.approx((width, height))


@pytest.mark.parametrize(
    "name", ["llava-next", "llava-onevision", "idefics3", "smolvlm", "internvl", "mllama", "gemma3"]
)
def test_tiles_keep_proportions(name: str):
    (view,) = make_views(family(name), [(30, 90)])
    assert view.to_shares((45.0, 15.0)) == (0.5, 0.5)
    assert not view.is_sized


def test_tiles_of_composed_models(parts: Parts):
    processor = composed(parts, "square", crops())
    processor.anyres = {"grids": [[1, 2], [2, 1]], "tile_size": 16, "tokens_side": 4}
    assert processor.tiling == AnyRes(**processor.anyres)
    (view,) = make_views(processor, [(30, 90)])
    assert view.to_shares((90.0, 15.0)) == (1.0, 0.5)
    several = make_views(processor, [(30, 90), (20, 20)])  # of several images, each is one padded square
    assert several[0].to_shares((90.0, 0.0)) == pytest.approx((1.0, 1 / 3))
    assert several[1].to_shares((20.0, 20.0)) == (1.0, 1.0)


def test_pixels_stay_within_the_image():
    view = ImageView(10, 20, 20, 20, offset=(5, 0))
    assert view.to_pixels((0.0, 0.0, 1.0, 1.0)) == (0.0, 0.0, 10, 20)
    assert view.whole_image() == ImageView(10, 20, 10, 20)


def test_boxes_and_points_are_clipped_to_what_is_seen():
    (view,) = make_views(family("llava-1.5", crops()), [(60, 120)])  # the middle 60 x 60 is seen, from x = 30 to 90
    assert view.clip((30, 0, 90, 60)) == (30, 0, 90, 60)
    assert view.clip((10, 5, 50, 25)) == pytest.approx((30, 5, 50, 25))
    assert view.clip((10, 5, 100, 25)) == pytest.approx((30, 5, 90, 25))
    assert view.clip((0, 0, 30, 60)) is None, "it ends where the middle begins"
    assert view.clip((100, 0, 110, 60)) is None
    assert view.clip((40, 10, 40, 10)) == (40, 10, 40, 10), "a box without area"
    assert view.clip((10, 10, 10, 10)) is None
    assert view.clip((31, 10)) == (31, 10)
    assert view.clip((29, 10)) is None


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["composed, squashed", "composed, padded", "llava, padded", "paligemma"])
def test_nothing_is_clipped_where_all_is_seen(name: str, size: tuple[int, int], parts: Parts):
    (view,) = make_views(MAKERS[name](parts), [size])
    for box in ((0, 0, size[1], size[0]), (size[1] / 3, 0, size[1], size[0] / 3), (0, 0), (size[1], size[0])):
        assert view.clip(box) == box
