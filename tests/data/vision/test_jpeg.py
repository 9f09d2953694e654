"""Images on their way to the model: the same pixels, whichever way they are decoded, and from any kind of file."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from tests.tiny_parts import byte_tokenizer
from vlm.data.encoding.labels import read_template
from vlm.data.sample import BadSample, ImageRef, Sample, Turn
from vlm.data.vision.jpeg import decode_sample_images, read_image_or_tensor
from vlm.models import VLMProcessor

SIZE = {"height": 24, "width": 24}
IMAGE_PROCESSORS = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SIZE),
    "siglip": SiglipImageProcessor(size=SIZE),
    "dinov2": BitImageProcessor(size={"shortest_edge": 28}, crop_size=SIZE),
    "crop larger than the picture": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
}


def photo(width: int = 61, height: int = 40) -> Image.Image:
    """Smooth shapes and some noise, as photographs have."""
    draw = np.random.default_rng(0)
    shapes = Image.fromarray(draw.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(shapes) * 0.9 + draw.integers(0, 25, (height, width, 1))).astype(np.uint8))


def processor(kind: str, mode: str = "square") -> VLMProcessor:
    tokenizer = byte_tokenizer(read_template("chatml"), bos="<s>", eos="</s>")
    return VLMProcessor(IMAGE_PROCESSORS[kind], tokenizer, image_mode=mode)


def sample(*pictures: ImageRef) -> Sample:
    return Sample("7", (Turn("user", pictures), Turn("assistant", ("a",))))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
@pytest.mark.parametrize("size", [(61, 40), (24, 24), (9, 33)], ids=str)
def test_pixels_are_the_image_processors_own(kind: str, size: tuple[int, int]):
    """To the last bit what its call gives."""
    ours, image = processor(kind), photo(*size)
    assert ours.raw_pixels([image]).dtype == torch.uint8
    assert torch.equal(ours.pixel_values([image]), IMAGE_PROCESSORS[kind]([image], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 20}], ids=str
)
def test_a_jpeg_has_the_pixels_that_pillow_reads(mode: str, options: dict):
    """Within one of 255 levels."""
    content = jpeg(photo(), **options)
    ours = processor("clip", mode)
    fast = read_image_or_tensor(ImageRef(content=content), "7")
    assert isinstance(fast, torch.Tensor)
    slow = ours.raw_pixels([Image.open(BytesIO(content))])
    assert (ours.raw_pixels([fast]).int() - slow.int()).abs().max() <= 1
    assert torch.equal(
        ours.raw_pixels(decode_sample_images(sample(ImageRef(content=content)), ours)), ours.raw_pixels([fast])
    )


def upright() -> Image.Image:
    """An image that is dark above and bright below."""
    image = Image.new("RGB", (24, 24), "black")
    image.paste("white", (0, 12, 24, 24))
    return image


def turned() -> bytes:
    """The same lying on its side, with the note which way is up."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return jpeg(upright().rotate(90), exif=exif, quality=95)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def animated() -> bytes:
    buffer = BytesIO()
    upright().save(buffer, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 24), "red")] * 2)
    return buffer.getvalue()


GRAY = np.asarray(upright().convert("L"))
KINDS = {
    "turned": turned(),
    "CMYK": jpeg(upright().convert("CMYK"), quality=95),
    "gray JPEG": jpeg(upright().convert("L"), quality=95),
    "palette": png(upright().convert("P")),
    "16 bits": png(Image.fromarray(GRAY.astype(np.uint16) * 257)),
    "one bit": png(upright().convert("1")),
    "with transparency": png(upright().convert("RGBA")),
    "animated": animated(),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["siglip"])
def test_every_kind_of_image_looks_as_it_should(kind: str, name: str):
    """Dark above, bright below."""
    ours = processor(kind)
    pixels = ours.raw_pixels(decode_sample_images(sample(ImageRef(content=KINDS[name])), ours)).float()
    assert pixels.shape == (1, 3, 24, 24)
    assert pixels[:, :, :10].mean() < 12
    assert pixels[:, :, 14:].mean() > 243


@pytest.mark.parametrize("length", [40, 300, -2])
def test_a_torn_jpeg_names_its_record(tmp_path: Path, length: int):
    (tmp_path / "a.jpg").write_bytes(jpeg(photo(200, 200))[:length])
    with pytest.raises(BadSample, match=r"record '7': image .*a.jpg does not open: ") as caught:
        decode_sample_images(sample(ImageRef(tmp_path / "a.jpg")), processor("clip"))
    assert caught.value.file == str(tmp_path / "a.jpg")
    with pytest.raises(BadSample, match=r"record '7': image .*b.jpg does not open: .*No such file"):
        decode_sample_images(sample(ImageRef(tmp_path / "b.jpg")), processor("clip"))


def test_a_sample_without_images_has_no_pixels():
    assert processor("clip").image_inputs(decode_sample_images(sample(), processor("clip"))) == {}
