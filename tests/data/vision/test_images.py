"""Opening images: whole ones decode, and errors name the record, the file and what the file is instead."""

import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from tests.tiny_parts import picture
from vlm.data.sample import BadSample, ImageRef, Sample, Turn, group_reasons
from vlm.data.vision.images import is_uniform, open_image, open_media, read_image_size


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = BytesIO()
    (image or picture(size=(64, 48))).save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A small PNG that says it has so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    framed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def given(folder: Path, name: str, content: bytes, how: str) -> ImageRef:
    """An image as a file, or as bytes that had a name."""
    if how == "file":
        (folder / name).write_bytes(content)
        return ImageRef(folder / name)
    return ImageRef(Path(name), content)


@pytest.mark.parametrize("how", ["file", "bytes"])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_an_image_is_decoded(tmp_path: Path, how: str, kind: str):
    found = given(tmp_path, "a", encoded(kind), how)
    opened = open_image(found, "7")
    (tmp_path / "a").unlink(missing_ok=True)
    assert opened.tobytes() == picture(size=(64, 48)).tobytes()


def test_a_header_tells_the_size(tmp_path: Path):
    whole = encoded("JPEG")
    assert read_image_size(given(tmp_path, "a.jpg", whole[:-500], "file"), "7") == (64, 48)
    assert read_image_size(ImageRef(None, whole), "7") == (64, 48)


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    content = encoded("GIF", frames[0], save_all=True, append_images=frames[1:])
    assert open_image(ImageRef(None, content), "7").convert("RGB").getpixel((5, 5)) == (255, 0, 0)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "a.jpg": (lambda: encoded("JPEG")[:-500], "image file is truncated"),
    "a.png": (lambda: encoded("PNG")[:-3000], "image file is truncated"),
    "a.webp": (lambda: encoded("WEBP", lossless=True)[:-500], ""),
    "a.gif": (lambda: encoded("GIF", picture().convert("P"))[:-500], "image file is truncated"),
    "empty.png": (lambda: b"", "the file is empty"),
    "page.jpg": (lambda: b"\n <!DOCTYPE html><html>", "it is text that begins with '<!DOCTYPE html' (a web page"),
    "noise.jpg": (lambda: bytes(range(200)), "begins with the bytes 00 01 02 03 04 05 06 07, not an image that"),
    "bomb.png": (lambda: png_of(20_000, 20_000), "decompression bomb"),
    "folder": (lambda: b"", "Is a directory"),
    "missing.png": (lambda: b"", "No such file"),
}
ONLY_FILES = ("folder", "missing.png")
WHOLE_HEADERS = ("a.jpg", "a.png", "a.gif")


@pytest.mark.parametrize("how", ["file", "bytes"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_decode_says_why(tmp_path: Path, name: str, how: str):
    content, said = BAD[name]
    if name in ONLY_FILES:
        found = ImageRef(tmp_path / name)
        (tmp_path / "folder").mkdir()
    else:
        found = given(tmp_path, name, content(), how)
    with pytest.raises(BadSample) as caught:
        open_image(found, "7")
    assert (caught.value.sample_id, caught.value.file) == ("7", str(found.path))
    assert caught.value.reason.startswith(f"image {found} does not open: ")
    assert said in caught.value.reason
    if name not in WHOLE_HEADERS:
        with pytest.raises(BadSample):
            read_image_size(found, "7")


OTHER_FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300), "HEIC.*save it as PNG or JPEG"),
    "dicom": (bytes(128) + b"DICM" + bytes(200), "DICOM"),
    "pdf": (b"%PDF-1.7\n" + bytes(200), "a PDF"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "zip": (b"PK\x03\x04" + bytes(200), "a ZIP archive"),
    "text": (b'{"error": "not found"}', "it is text that begins with .*, not an image"),
    "header": (b"\x89PNG\r\n\x1a\n", "a PNG image that is damaged or truncated"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_what_is_no_image_is_named_in_the_same_words_each_time(tmp_path: Path, kind: str):
    """Pillow names the object that it read instead, with an address in memory."""
    content, said = OTHER_FILES[kind]
    problems = []
    for found in (ImageRef(None, content), ImageRef(None, content), given(tmp_path, "a", content, "file")):
        with pytest.raises(BadSample, match=said) as caught:
            open_image(found, "7")
        problems.append(caught.value)
    assert problems[0].reason == problems[1].reason
    assert " at 0x" not in problems[0].reason
    assert problems[2].reason.replace(str(tmp_path / "a"), "in the record itself") == problems[0].reason


def test_images_that_are_cut_at_different_places_have_one_reason(tmp_path: Path):
    problems = []
    for number, left in enumerate((500, 900, 1300)):
        with pytest.raises(BadSample, match="image file is truncated") as caught:
            open_image(given(tmp_path, f"{number}.jpg", encoded("JPEG")[:-left], "file"), "7")
        problems.append(caught.value)
    assert group_reasons(problems) == [("image … does not open: image file is truncated", 3)]


def test_an_image_of_one_colour_is_told_from_others():
    assert is_uniform(Image.new("RGB", (8, 8), (200, 30, 30)))
    assert not is_uniform(picture(size=(8, 8)))


def test_bytes_without_a_name_are_told_as_such():
    with pytest.raises(BadSample, match="image in the record itself does not open: the file is empty") as caught:
        open_image(ImageRef(None, b""), "7")
    assert caught.value.file is None


def test_a_large_image_that_is_no_bomb_is_opened_without_a_warning():
    """Pillow warns from half of what it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image_size(ImageRef(None, png_of(10_000, 10_000)), "7") == (10_000, 10_000)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SyntaxError, OverflowError, ValueError, OSError])
def test_whatever_a_decoder_raises_is_the_records_trouble(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    """Those of AVIF raise RuntimeError."""

    def fail(*_: Any) -> None:
        raise error("no such luck")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BadSample, match="record '7': image in the record itself does not open: no such luck"):
        open_image(ImageRef(None, encoded("BMP")), "7")


def test_the_images_of_a_sample_come_in_order(tmp_path: Path):
    sizes = [(10, 12), (14, 16), (18, 20)]
    contents = [encoded("PNG", picture(size=size)) for size in sizes]
    (tmp_path / "a.png").write_bytes(contents[0])
    shown = [ImageRef(tmp_path / "a.png"), ImageRef(None, contents[1]), ImageRef(None, contents[2])]
    turns = (Turn("user", (shown[1], "and", shown[0], shown[0])), Turn("assistant", ("a",)), Turn("user", (shown[2],)))
    assert [image.size for image in open_media(Sample("7", turns))] == [sizes[1], sizes[0], sizes[0], sizes[2]]
    broken = Sample("9", (Turn("user", (shown[0], ImageRef(tmp_path / "b.png"))),))
    with pytest.raises(BadSample, match=r"record '9': image .*b.png does not open"):
        open_media(broken)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


@pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 28, len(EPS), 0, 0, 0, 0) + EPS])
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    from vlm.models.pixels import load_images

    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/mark\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "a.png").write_bytes(content)
    for ref in (ImageRef(tmp_path / "a.png"), ImageRef(content=content)):
        for read in (open_image, read_image_size):
            with pytest.raises(BadSample, match="PostScript: save it as PNG or JPEG"):
                read(ref, "x")
    with pytest.raises(ValueError, match="PostScript is not read"):
        load_images(str(tmp_path / "a.png"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_the_formats_that_people_have_are_read(kind: str):
    assert open_image(ImageRef(content=encoded(kind)), "x").format == kind


@pytest.mark.parametrize("kind", ["SGI", "PCX", "IM"])
def test_another_format_is_told(kind: str):
    with pytest.raises(BadSample, match="not an image that is read here; save it as PNG or JPEG"):
        open_image(ImageRef(content=encoded(kind)), "x")


def test_a_small_tiff_with_a_huge_tile_is_told(monkeypatch: pytest.MonkeyPatch):
    """A tile is decoded whole, however small the image is."""
    tile = zlib.compress(bytes(64 * 64))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 64), (323, 64),
            (324, 8 + 2 + 10 * 12 + 4), (325, len(tile))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile
    assert open_image(ImageRef(content=content), "x").size == (16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadSample, match="it has tiles of 4,096 pixels"):
        open_image(ImageRef(content=content), "x")
