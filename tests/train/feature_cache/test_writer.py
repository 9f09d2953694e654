"""What ranks that do not share a disk are told."""

from pathlib import Path

import pytest

from vlm.train.feature_cache.writer import require_folder


def test_a_pack_that_another_machine_does_not_have_is_explained(tmp_path: Path):
    assert require_folder(tmp_path) == tmp_path
    for name in ("a", "a.partial"):
        with pytest.raises(ValueError, match=r"another rank wrote it, .* must be a folder that all machines share"):
            require_folder(tmp_path / "store" / name)
