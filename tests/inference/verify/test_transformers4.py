"""transformers 4 in an environment of its own: made once, whole or not at all."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.inference.verify.conftest import Served
from vlm.inference.verify import transformers4
from vlm.inference.verify.cases import make_cases
from vlm.inference.verify.transformers4 import REQUIREMENTS, Transformers4, find_environment
from vlm.inference.verify.verify import Settings, verify


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    python = find_environment(tmp_path)
    assert [word for word in commands[1] if word in REQUIREMENTS] == [*REQUIREMENTS]
    assert any(word.startswith("numpy==") for word in commands[1])
    assert "is being installed into" in capsys.readouterr().out
    (seen,) = tmp_path.rglob("seen.pth")
    assert "site-packages" in seen.read_text()
    assert find_environment(tmp_path) == python
    assert len(commands) == 2
    assert capsys.readouterr().out == ""


def test_without_a_network_that_is_said_and_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        said = "" if "venv" in command else "warning\nERROR: No matching distribution found for transformers==4.57.6\n"
        return subprocess.CompletedProcess(command, int(bool(said)), "", said)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(this needs a network, once\): ERROR: No matching distribution found"):
            find_environment(tmp_path)
    assert list(tmp_path.rglob("complete")) == []


@pytest.mark.usefixtures("read_here")
def test_it_reads_the_export_with_the_fast_image_processor(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers4, "find_environment", lambda cache: Path("python"))
    jobs: list[Any] = []
    monkeypatch.setattr(transformers4, "PROCESSOR_OPTIONS", {})  # version 5 reads it otherwise
    made = transformers4.ReadingJob
    monkeypatch.setattr(transformers4, "ReadingJob", lambda *given: jobs.append(given) or made(*given))
    certificate = verify(served.final, served.model, Transformers4(), make_cases(2), Settings(2))
    assert certificate.difference is None
    assert "use_fast=True" in certificate.notes[0]
    ((folder, has_code, python, _),) = jobs
    assert (folder.name, has_code, python) == ("llava", False, Path("python"))
