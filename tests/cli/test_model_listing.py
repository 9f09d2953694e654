"""`vlm models`: every installed type, with what was proved of it, without importing torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.cli.main import main
from vlm.families import installed, proved
from vlm.families.installed import image_text_types, is_family_type
from vlm.families.proved import Proved, read_proved
from vlm.families.table import FAMILIES


def test_every_installed_type_is_listed(capsys: pytest.CaptureFixture[str]):
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    assert image_text_types() == dict(NAMES)
    main(["models"])
    said = capsys.readouterr().out
    words = said.split()
    for model_type in (*NAMES, *FAMILIES):
        assert model_type in words
    assert "qwen2.5-vl-3b" in said
    assert "openai/clip-vit-base-patch16" in said
    assert "facebook/dinov2-with-registers-large and google/siglip-so400m-patch14-384" in said


def test_the_list_imports_no_torch():
    code = "import sys; from vlm.cli.main import main; main(['models']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"}.isdisjoint(done.stderr.split())


def test_what_was_proved_is_read_from_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(proved.resources, "files", lambda _: tmp_path)
    assert read_proved() == Proved()
    assert read_proved().summarise("llava") == "-"
    verdicts = {
        "llava": {"parts": "proved", "packing": "proved"},
        "gemma3": {"parts": "proved", "packing": "failed: a sample sees another"},
        "git": {"parts": "not made: no"},
    }
    content = {"transformers": "5.23.0", "date": "2026-11-30", "types": verdicts}
    (tmp_path / "proved.json").write_text(json.dumps(content))
    table = read_proved()
    assert [table.summarise(kind) for kind in (*verdicts, "fuyu")] == ["all", "all but packing", "none", "-"]


def test_a_transformers_without_its_table_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed, "MAPPING_NAME", "NO_SUCH_TABLE")
    image_text_types.cache_clear()
    with pytest.raises(ImportError, match=r"modeling_auto\.py has no NO_SUCH_TABLE"):
        image_text_types()
    monkeypatch.undo()
    assert is_family_type("glm4v")
    assert is_family_type("phi4_multimodal")
    assert not is_family_type("llama")
