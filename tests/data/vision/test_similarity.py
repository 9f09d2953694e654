"""Near copies of images: what is found again when it was saved anew, and what is not taken for a copy."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from vlm.data.vision.similarity import ImageSketch, SketchIndex, sketch_image


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """An image of coloured shapes, as different as the seeds."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        (left, right), (top, bottom) = (sorted(random.integers(0, side, 2).tolist()) for side in size)
        draw.ellipse((left, top, right + 1, bottom + 1), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def saved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


COPIES = {
    "JPEG": lambda image: saved(image, "JPEG", quality=50),
    "WebP": lambda image: saved(image, "WEBP", quality=60),
    "half the size": lambda image: image.resize((80, 60)),
    "twice the size": lambda image: image.resize((320, 240), Image.Resampling.BICUBIC),
    "with a palette": lambda image: image.quantize(64),
    "with an alpha channel": lambda image: image.convert("RGBA"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_was_saved_anew_is_found(name: str):
    index = SketchIndex()
    for seed in range(20):
        index.add(sketch_image(scene(seed)))
    assert [index.find(sketch_image(COPIES[name](scene(seed)))) for seed in range(20)] == list(range(20))


def test_other_images_are_no_copies():
    index = SketchIndex()
    for seed in range(60):
        sketch = sketch_image(scene(seed))
        assert index.find(sketch) is None
        index.add(sketch)


def test_the_same_drawing_in_another_colour_is_no_copy():
    """A perceptual hash alone does not see colour."""
    red, green = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    for image, colour in ((red, (220, 40, 40)), (green, (40, 100, 40))):
        ImageDraw.Draw(image).rectangle((10, 20, 50, 40), fill=colour)
    index = SketchIndex()
    index.add(sketch_image(red))
    assert (sketch_image(red).bits ^ sketch_image(green).bits).bit_count() <= 12
    assert index.find(sketch_image(green)) is None


def test_an_image_on_its_side_is_compared_upright():
    image = scene(3)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    turned.save(buffer, "JPEG", exif=exif, quality=95)
    lying = Image.open(buffer)
    index = SketchIndex()
    index.add(sketch_image(ImageOps.exif_transpose(lying)))
    assert index.find(sketch_image(lying)) == 0
    assert index.find(sketch_image(turned)) is None


def test_a_sketch_is_written_and_read_and_the_index_grows():
    sketch = sketch_image(scene(1))
    assert ImageSketch.from_text(sketch.to_text()) == sketch
    index = SketchIndex()
    for _ in range(1500):
        index.add(ImageSketch(2**64 - 1, bytes(768)))
    assert index.add(sketch) == 1500
    assert index.find(sketch) == 1500
    assert len(index) == 1501


def test_a_plain_image_is_a_copy_of_one_in_nearly_its_colour():
    index = SketchIndex()
    index.add(sketch_image(Image.new("RGB", (50, 50), (100, 100, 100))))
    assert index.find(sketch_image(Image.new("RGB", (50, 50), (100, 100, 100)))) == 0
    assert index.find(sketch_image(Image.new("RGB", (50, 50), (130, 100, 100)))) is None
    assert index.find(sketch_image(Image.new("I;16", (50, 50)))) is None
