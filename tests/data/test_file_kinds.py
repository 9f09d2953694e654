"""What a file is by its first bytes: named in the same words for every file of a kind."""

import gzip
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.data.vision.test_images import encoded
from vlm.data.file_kinds import NUM_HEAD_BYTES, describe_bytes, read_head


def zipped() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", b"x")
    return file.getvalue()


KINDS = {
    "nothing": (b"", "the file is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300), "HEIC"),
    "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(300), "HEIC"),
    "avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(300), "AVIF"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + bytes(300), "a video (MP4"),
    "dicom": (bytes(128) + b"DICM" + bytes(200), "DICOM"),
    "pdf": (b"%PDF-1.7\n", "a PDF"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "markup": (b"<error>no such key</error>", "it is text that begins with '<error>no such"),
    "zip": (zipped(), "a ZIP archive"),
    "gzip": (gzip.compress(b"{}"), "gzip-compressed"),
    "parquet": (b"PAR1\x15\x04", "Parquet"),
    "utf-16": ("[{}]".encode("utf-16"), "UTF-16"),
    "json": (b'{"message": "not found"}', 'it is text that begins with \'{"message": "'),
    "text": ("línea".encode() * 200, "it is text that begins with"),
    "zeros": (bytes(600), "nothing but zeros"),
    "image": (encoded("PNG"), "a PNG image"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_file_is_named(tmp_path: Path, kind: str):
    content, said = KINDS[kind]
    (tmp_path / "a").write_bytes(content)
    assert said in str(describe_bytes(read_head(tmp_path / "a")))
    assert describe_bytes(content[:NUM_HEAD_BYTES]) == describe_bytes(read_head(tmp_path / "a"))


def test_what_is_not_known_has_no_name():
    assert describe_bytes(bytes(range(200))) is None
