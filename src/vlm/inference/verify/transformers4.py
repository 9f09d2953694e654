"""transformers 4, in an environment of its own, which is made once, in the cache folder.

PyTorch is not downloaded again: the environment sees the one that is installed here, and gets transformers 4 and what
that needs in other versions. The newest version 4 is named here, so that a certificate says what was installed.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm.data.cache import resolve_cache_folder
from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import Observation, Request, State
from vlm.inference.verify.reading_job import ReadingJob
from vlm.inference.verify.served_forms import exported_form

REQUIREMENTS = ("transformers==4.57.6",)
"""What is installed with what it needs; PyTorch, torchvision and Pillow are those of this environment."""

DOWNLOAD_SIZE = "about 60 MB to download, 260 MB on disk"

PROCESSOR_OPTIONS = {"use_fast": True}
"""Version 4 resizes images with Pillow unless told so, and training resizes with torchvision."""


class Transformers4:
    """Reads the export to LLaVA, which is the form that version 4 knows."""

    def __init__(self):
        self._jobs: dict[Path, ReadingJob] = {}

    def observe(self, request: Request) -> Observation:
        """Return what the export gives there, see `Engine.observe`; installs the environment where it is missing."""
        python = find_environment(resolve_cache_folder(None))
        folder, said = exported_form(request, "llava")
        job = ReadingJob(folder, False, python, PROCESSOR_OPTIONS)
        self._jobs[request.scratch] = job
        observation = job.observe(request)
        notes = ["the image processor was loaded with use_fast=True; without it, version 4 resizes with Pillow", *said]
        return replace(observation, notes=notes)

    def trace(self, request: Request, case: Case) -> State:
        """Return what the parts give for a case, see `Engine.trace`; `observe` comes before it."""
        return self._jobs[request.scratch].trace(request, case)


def find_environment(cache: Path) -> Path:
    """Return the interpreter of the environment, which is made below a cache folder if it is not there yet.

    Raises:
        ValueError: it cannot be installed, as without a network.
    """
    version = REQUIREMENTS[0].partition("==")[2]
    folder = cache / "environments" / f"transformers-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").is_file():
        print(
            f"transformers {version} is being installed into {folder} (only once): "
            f"{', '.join(REQUIREMENTS)}, {DOWNLOAD_SIZE}; "
            "PyTorch is the installed one",
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        _install(folder, python)
        (folder / "complete").touch()
    return python


def _install(folder: Path, python: Path) -> None:
    """Make the environment: its own packages, and behind them those of this one."""
    _run([sys.executable, "-m", "venv", str(folder)])
    numpy = f"numpy=={importlib.metadata.version('numpy')}"  # PyTorch is built for it
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS, numpy])
    site = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "seen.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise ValueError(f"transformers 4 could not be installed (this needs a network, once): {lines[-1][:300]}")


ENGINE = Transformers4()
