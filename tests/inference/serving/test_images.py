"""Images of requests: what is opened, what is refused before it is decoded, and what is kept."""

import base64
import struct
import tracemalloc
import zlib
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image

from tests.inference.serving.running import to_part
from tests.tiny_parts import Parts, picture
from vlm.config.serving_schema import ServingConfig
from vlm.data.sample import ImageRef, Turn
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.images import ImageReader

EPS = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
"""A format for which Pillow would run another program."""


def read(model: VisionLanguageModel, part: dict[str, Any] | str, **limits: Any) -> Any:
    url = part if isinstance(part, str) else part["image_url"]["url"]
    return ImageReader(model.processor, ServingConfig(**limits)).read(url, "here")


@pytest.mark.parametrize("size", [(40, 30), (300, 200), (30, 40), (7, 90)])
@pytest.mark.parametrize("image_mode", ["square", "pad"])
def test_what_is_kept_of_an_image_becomes_the_same_pixels(parts: Parts, size: tuple[int, int], image_mode: str):
    processor = parts.processor("clip", "llama", image_mode=image_mode)
    model = VisionLanguageModel(None, processor)  # pyright: ignore[reportArgumentType]
    image = picture(3, size)
    kept = read(model, to_part(image))
    assert kept.shape[1:] == processor.image_inputs([image])["pixel_values"].shape[2:]
    assert torch.equal(processor.image_inputs([kept])["pixel_values"], processor.image_inputs([image])["pixel_values"])


def test_an_image_whose_size_matters_is_kept_whole(parts: Parts):
    model = VisionLanguageModel(None, parts.processor("siglip", "llama"))  # pyright: ignore[reportArgumentType]
    model.processor.anyres = {"grid_pinpoints": [[24, 48], [48, 24]], "tile_size": 24, "patches_per_side": 3}  # pyright: ignore[reportAttributeAccessIssue]
    kept = read(model, to_part(picture(0, (50, 20))))
    assert (kept.size, kept.mode) == ((50, 20), "RGB")


def test_a_prompt_with_the_image_of_a_request_is_that_of_generate(model: VisionLanguageModel):
    turns, image = [Turn("user", (ImageRef(), "\nwhat?"))], picture(5, (120, 80))
    ours, theirs = (model.inputs([turns], [[medium]]) for medium in (read(model, to_part(image)), image))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_forms_of_images(model: VisionLanguageModel, form: str):
    assert read(model, to_part(picture(0), form)) is not None


def test_the_first_image_of_several_is_taken(model: VisionLanguageModel):
    frames = [picture(seed) for seed in range(3)]
    animated = to_part(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(read(model, animated), read(model, to_part(frames[0])))


@pytest.mark.parametrize(("url", "words"), [
    ("http://127.0.0.1:9/cat.png", "addresses are not fetched"),
    ("file:///etc/hostname", "addresses are not fetched"),
    ("/etc/hostname", "addresses are not fetched"),
    ("data:text/plain;base64,AAAA", "data:image/png;base64"),
    ("data:image/png,AAAA", "data:image/png;base64"),
    ("data:image/png;base64,@@@", "base64 cannot be decoded"),
    ("data:image/png;base64,ä", "base64 cannot be decoded"),
    ("data:image/png;base64,", "the image does not open"),
    ("data:image/png;base64,AAAA", "the image does not open"),
    ("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "the image does not open"),
    (f"data:image/eps;base64,{EPS}", "the image does not open"),
])  # fmt: skip
def test_images_come_with_the_request_and_from_nowhere_else(model: VisionLanguageModel, url: str, words: str):
    with pytest.raises(RequestError) as refused:
        read(model, url)
    assert words in refused.value.message
    assert refused.value.param == "here"


@pytest.mark.parametrize(("size", "key"), [
    ((6000, 6000), "max_image_pixels"), ((9000, 200), "max_image_side"), ((5000, 10), "max_aspect_ratio"),
])  # fmt: skip
def test_a_bomb_is_refused_by_its_header(model: VisionLanguageModel, size: tuple[int, int], key: str):
    part = to_part(Image.new("1", size))
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=key):
            read(model, part)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def make_tiled_tiff(side: int, tile_side: int) -> dict[str, Any]:
    """A grey TIFF of one compressed tile, which may be larger than the image."""
    tile = zlib.compress(bytes(tile_side * tile_side))
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile_side), (323, tile_side),
            (324, 8 + 2 + 10 * 12 + 4), (325, len(tile))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile
    url = f"data:image/tiff;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_small_image_in_a_huge_tile_is_refused(model: VisionLanguageModel):
    """A TIFF decodes a tile whole: its size counts, not the image's."""
    assert read(model, make_tiled_tiff(16, 64)) is not None
    with pytest.raises(RequestError, match="max_image_pixels"):
        read(model, make_tiled_tiff(16, 1024), max_image_pixels=1000_000)


def test_all_images_of_a_request_have_a_limit(model: VisionLanguageModel):
    reader = ImageReader(model.processor, ServingConfig(max_request_pixels=3000))
    url = to_part(picture(0))["image_url"]["url"]
    reader.read(url, "first")
    reader.read(url, "second")
    with pytest.raises(RequestError, match=r"third.*max_request_pixels"):
        reader.read(url, "third")


def to_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def save(form: str, size: tuple[int, int] = (16, 16), **options: Any) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (1, 200, 3)).save(file, form, **options)
    return file.getvalue()


def make_exif_pieces(number: int, length: int) -> bytes:
    """A JPEG whose EXIF data are many segments: Pillow appends them one by one."""
    content = b"Exif\0\0" + b"a" * length
    segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    image = save("JPEG")
    return image[:2] + segment * number + image[2:]


def make_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan stands there many times."""
    image = save("JPEG", progressive=True)
    begin, end = image.rindex(b"\xff\xc4", 0, image.rindex(b"\xff\xda")), image.rindex(b"\xff\xd9")
    return image[:end] + image[begin:end] * number + image[end:]


def make_overlapping_tags(number: int, length: int) -> bytes:
    """A TIFF whose tags all refer to the same bytes."""
    own = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
           (277, 3, 1, 1), (278, 3, 1, 4), (279, 4, 1, 16)]  # fmt: skip
    tags = [*own, *((40000 + place, 7, length, 8) for place in range(number))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4 + length)


def make_png_with(kind: bytes, content: bytes, number: int = 1) -> bytes:
    image = save("PNG")
    place = image.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return image[:place] + chunk * number + image[place:]


def make_comments(number: int) -> bytes:
    image = save("GIF")
    place = image.rindex(b",")
    return image[:place] + (b"!\xfe\xff" + b"c" * 255 + b"\0") * number + image[place:]


@pytest.mark.parametrize(("content", "words"), [
    (make_exif_pieces(10_000, 16), "EXIF|pieces"),
    (make_exif_pieces(3, 60_000), "EXIF"),
    (make_scans(200), "scans"),
    (make_overlapping_tags(100, 1_000_000), "overlaps"),
    (make_png_with(b"eXIf", make_overlapping_tags(100, 100_000)), "EXIF"),
    (make_png_with(b"abCd", b"", 10_000), "pieces"),
    (make_comments(10_000), "pieces"),
])  # fmt: skip
def test_metadata_that_would_take_all_time_or_memory_are_refused(
    model: VisionLanguageModel, content: bytes, words: str
):
    with pytest.raises(RequestError, match=words) as refused:
        read(model, to_url(content))
    assert refused.value.code == "invalid_image"


def test_metadata_as_cameras_write_them_are_taken(model: VisionLanguageModel):
    exif = Image.Exif()
    exif[274], exif[37500] = 6, b"m" * 50_000  # orientation, and what a maker writes
    assert read(model, to_url(save("JPEG", exif=exif, icc_profile=b"p" * 500_000, progressive=True))) is not None
