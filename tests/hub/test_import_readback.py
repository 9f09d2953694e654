"""Imports are compared with their sources; what computes something else leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from tests.hub.foreign import transformers_llava, write_original, write_transformers
from tests.tiny_parts import Parts
from vlm.hub import readback
from vlm.hub.importing import import_checkpoint
from vlm.hub.shards import ShardWriter


@pytest.mark.parametrize("kind", ["transformers", "original"])
def test_an_import_that_computes_something_else_is_refused(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    if kind == "original":
        write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    else:
        write_transformers(tmp_path / "theirs", parts)
    add = ShardWriter.add

    def damage(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        add(self, name, tensor * 1.5 if name == "connector.layers.0.weight" else tensor)

    monkeypatch.setattr(ShardWriter, "add", damage)
    with pytest.raises(ValueError, match=r"theirs was not imported: the files written have .* that differ by"):
        import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_a_comparison_for_which_memory_is_short_is_said(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    write_original(tmp_path / "theirs", parts, transformers_llava(parts))
    monkeypatch.setattr(readback, "read_available_memory", lambda: 1000)
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert "was not compared with what was written: the weights need 0 GB of memory, but 0 GB are free" in caplog.text
    assert (tmp_path / "ours" / "config.json").is_file()
