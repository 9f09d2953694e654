"""The wheel holds everything that is not Python too, and works where there is no source."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("small_vlm-*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def vlm(unpacked: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the unpacked wheel comes before any other installation."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=unpacked, env=environment
    )


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(file.relative_to(SOURCE))
        for pattern in ("*.py", "*.yaml", "*.jinja", "*.json", "*.css", "*.sh", "*.bash", "*.zsh", "*.fish", "py.typed")
        for file in SOURCE.rglob(pattern)
    }
    assert {"vlm/config/base.yaml", "vlm/data/templates/v1.jinja", "vlm/models/modeling_vlm.py"} <= wanted
    assert "vlm/py.typed" in held  # type checkers of users read our annotations
    assert wanted - held == set()
    others = {name for name in held - wanted if ".dist-info/" not in name}
    assert others == set()


def test_the_wheel_carries_licence_and_console_script(unpacked: Path):
    info = next(unpacked.glob("small_vlm-*.dist-info"))
    assert "MIT License" in (info / "licenses" / "LICENSE").read_text()
    entries = (info / "entry_points.txt").read_text()
    assert "vlm = vlm.cli.main:main" in entries
    assert "push-to-hub = vlm.cli.push_to_hub:main" in entries


def test_the_unpacked_wheel_composes_runs_and_has_its_templates(unpacked: Path):
    file = vlm(unpacked, "-c", "import vlm; print(vlm.__file__)").stdout.strip()
    assert file == str(unpacked / "vlm" / "__init__.py")
    shown = vlm(unpacked, "-m", "vlm", "-cn", "pretrain-llava", "dataset.path=x.json", "--cfg", "job")
    assert "hf_name: lmsys/vicuna-7b-v1.5" in shown.stdout, shown.stderr
    refused = vlm(unpacked, "-m", "vlm", "-cn", "pretrain-llava", f"dataset.path={unpacked}",
                  "dataset.template=nothing")  # fmt: skip
    assert "allowed are chatml, gemma, llama3, mistral, phi, plain, v1, tokenizer" in refused.stderr
