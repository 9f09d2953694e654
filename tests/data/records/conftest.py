"""The image folder that records of these tests name."""

from pathlib import Path

import pytest

from tests.tiny_parts import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png`, `b.png`, `deep/c.png`, `v.mp4` and `w.mp4`; `outside.png` stands beside it."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png", "../outside.png"):
        picture().save(images / name)
    for name in ("v.mp4", "w.mp4"):
        (images / name).write_bytes(b"")
    return images
