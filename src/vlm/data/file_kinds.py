"""What kind of file something is, by its first bytes: for messages about files that are not what they should be.

Imports the standard library only. To name another kind, add a row to `SIGNATURES`.
"""

import re
from pathlib import Path

NUM_HEAD_BYTES = 512
"""The first bytes of a file, by which its kind is told."""

CONVERT_IMAGE = "save it as PNG or JPEG"
LFS_POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
HEIC = f"HEIC, a phone's format that Pillow does not read: {CONVERT_IMAGE}"
UTF16 = "text in UTF-16, where UTF-8 is needed: iconv -f UTF-16 -t UTF-8 OLD > NEW"

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs.github.com/spec/", LFS_POINTER),
    (128, b"DICM", f"DICOM: {CONVERT_IMAGE}, with the window that shows what matters (pydicom reads it)"),
    (0, b"%PDF", "a PDF: save its pages as images"),
    (0, b"%!PS", f"PostScript: {CONVERT_IMAGE}"),
    (0, b"\xc5\xd0\xd3\xc6", f"PostScript: {CONVERT_IMAGE}"),
    (0, b"8BPS", f"a Photoshop file: {CONVERT_IMAGE}"),
    (0, b"\x00\x00\x00\x0cJXL ", f"JPEG XL: {CONVERT_IMAGE}"),
    (0, b"\xff\x0a", f"JPEG XL: {CONVERT_IMAGE}"),
    (0, b"PK\x03\x04", "a ZIP archive: unpack it first"),
    (0, b"PK\x05\x06", "an empty ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (0, b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (0, b"\x1f\x8b", "gzip-compressed: gunzip it first"),
    (0, b"BZh", "bzip2-compressed: bunzip2 it first"),
    (0, b"\xfd7zXZ\x00", "xz-compressed: unxz it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed: unzstd it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (0, b"PAR1", "Parquet: name it .parquet"),
    (0, b"ARROW1", "an Arrow file: name it .arrow"),
    (0, b"\x93NUMPY", f"a numpy array: {CONVERT_IMAGE}"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5: save its parts as files of their own"),
    (344, b"n+1\x00", f"NIfTI, a volume: {CONVERT_IMAGE}, slice by slice"),
    (0, b"SIMPLE  =", f"FITS: {CONVERT_IMAGE}"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (0, b"ID3", "sound (MP3)"),
    (0, b"SQLite format 3\x00", "an SQLite database: export its table"),
    (0, b"\xff\xfe\x00\x00", "text in UTF-32, where UTF-8 is needed: iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (0, b"\xff\xfe", UTF16),
    (0, b"\xfe\xff", UTF16),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\x00", "a TIFF image, or a camera's raw file"),
    (0, b"MM\x00*", "a TIFF image, or a camera's raw file"),
)
"""Where a signature stands, the signature, and what a file with it is; the first that fits counts."""

BRANDS = {
    "heic": HEIC,
    "heix": HEIC,
    "hevc": HEIC,
    "heim": HEIC,
    "heis": HEIC,
    "hevx": HEIC,
    "mif1": HEIC,
    "msf1": HEIC,
    "avif": f"AVIF, damaged or of a kind that this Pillow does not read: {CONVERT_IMAGE}",
    "avis": f"AVIF, damaged or of a kind that this Pillow does not read: {CONVERT_IMAGE}",
    "crx ": f"a camera's raw file: {CONVERT_IMAGE}",
    "M4A ": "sound (AAC)",
}
"""The brand of a file of ISO's base format, at its fourth byte after `ftyp` -> what it is; others are videos."""
RIFF_KINDS = {b"WAVE": "sound (WAV)", b"AVI ": "a video (AVI)", b"WEBP": "a WebP image"}


def describe_bytes(head: bytes) -> str | None:
    """Describe a file by its first `NUM_HEAD_BYTES` bytes, with what to do about it; None if it is not known."""
    if not head:
        return "the file is empty"
    for place, signature, kind in SIGNATURES:
        if head[place : place + len(signature)] == signature:
            return kind
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12].decode("latin-1"), "a video (MP4 or QuickTime)")
    if head[:4] == b"RIFF":
        return RIFF_KINDS.get(head[8:12])
    return _describe_text(head)


def _describe_text(head: bytes) -> str | None:
    """Describe markup and other text; None for anything that is not text."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"<"):
        lower = start.lower()
        if b"<svg" in lower:
            return f"SVG, a drawing without pixels: {CONVERT_IMAGE}"
        shown = start[:14].decode(errors="replace")
        is_page = lower.startswith((b"<!doctype html", b"<html"))
        page = " (a web page, such as a server sends in place of a file)" if is_page else ""
        return f"it is text that begins with {shown!r}{page}"
    if not start:
        return "it has nothing but white space" if not head.strip(b" \t\r\n") else None
    if start[:1] in b"{[" and _is_plain_text(start):
        return f"it is text that begins with {start[:14].decode(errors='replace')!r}, such as JSON"
    if _is_plain_text(start):
        return f"it is text that begins with {start[:14].decode(errors='replace')!r}"
    return "nothing but zeros, as a download that was cut short leaves" if not head.strip(b"\0") else None


def _is_plain_text(content: bytes) -> bool:
    """Return whether bytes are UTF-8 (of which the last character may be cut) without control characters."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if error.start < len(content) - 3:
            return False
        text = content[: error.start].decode()
    return not re.search(r"[\x00-\x08\x0e-\x1f]", text)


def read_head(path: Path) -> bytes:
    """Read the bytes by which a file's kind is told."""
    with path.open("rb") as file:
        return file.read(NUM_HEAD_BYTES)


def show_start(head: bytes) -> str:
    """Show the first bytes of a file of an unknown kind."""
    return f"a file of an unknown kind, which begins with the bytes {head[:8].hex(' ')}"
