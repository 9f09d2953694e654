"""The Dockerfile names what there is: files, targets, a Python that the package takes; nothing runs as root."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.replace("\\\n", " ").splitlines() if line.strip()]
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def arguments(instruction: str) -> list[str]:
    """What stands behind an instruction, each time that it occurs."""
    return [rest for name, rest in STEPS if name == instruction]


def is_ignored(path: str) -> bool:
    """Whether a file of the clone is kept from the image."""
    return any(fnmatch(part, rule.removeprefix("**/")) or path == rule for rule in IGNORED for part in path.split("/"))


def test_every_step_is_one_that_is_checked_here():
    assert [name for name, _ in STEPS] == [
        "ARG", "FROM", "RUN", "RUN", "USER", "WORKDIR", "ARG", "ARG", "COPY", "RUN", "COPY", "ENV", "CMD",
    ]  # fmt: skip


def test_its_python_is_one_that_the_package_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    match = re.fullmatch(r"BASE=python:(\d+\.\d+)-slim", arguments("ARG")[0])
    assert match is not None
    assert match[1] in SpecifierSet(project["requires-python"])
    assert arguments("FROM") == ["${BASE}"]


def test_the_files_that_are_copied_exist_and_suffice_to_install_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from hatchling.build import build_editable

    *names, target = arguments("COPY")[0].removeprefix("--chown=vlm:vlm ").split()
    assert target == "./"
    for name in names:
        assert not is_ignored(name)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "src" / "vlm").mkdir(parents=True)
    (tmp_path / "src" / "vlm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert build_editable(str(tmp_path / "dist")).startswith("small_vlm-")
    needed = re.search(r"^\.venv/installed: ([^|]*)\|", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert needed is not None
    assert set(needed[1].split()) <= set(names)


def test_the_code_is_copied_and_what_was_built_here_is_not():
    for path in ("src/vlm/cli/main.py", "examples/make_data.py", "requirements.lock", "docs/README.md"):
        assert (ROOT / path).is_file()
        assert not is_ignored(path), path
    for path in (".venv/bin/python", "outputs/run/final", ".git/config", "src/vlm/__pycache__/x.pyc"):
        assert is_ignored(path), path


def test_it_installs_by_make_with_what_make_needs():
    packages, _, install = arguments("RUN")
    assert install.endswith("make install")
    for package in ("git", "make", "g++", "ca-certificates", "python3-venv"):
        assert f" {package} " in packages.replace(")", " "), package


def test_nothing_but_the_setup_of_the_system_runs_as_root():
    names = [name for name, _ in STEPS]
    assert arguments("USER") == ["vlm"]
    assert names[: names.index("USER")].count("RUN") == 2
    assert "--uid 1000 vlm" in arguments("RUN")[1]
    assert all(rest.startswith("--chown=vlm:vlm ") for rest in arguments("COPY"))
    assert arguments("ENV") == [f"PATH={arguments('WORKDIR')[0]}/.venv/bin:$PATH"]
