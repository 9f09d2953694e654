"""The YAML files of this package: its runs and groups.

Imports the standard library. Functions that parse a file import OmegaConf, which cannot be installed with lmms-eval.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).parent
"""The folder of the packaged YAML files."""

CITATION = re.compile(r" \((?:[^()]|\([^()]*\))*(?:arXiv|https?):(?:[^()]|\([^()]*\))*\)")
"""A paper or an address in parentheses, with the space before it."""

SUMMARY_END = re.compile(r"(?<=[A-Za-z0-9)])(?:\.(?= [A-Z]|$)|; |, as in )")
"""Where the first statement of a description ends."""

NON_RUN_CONFIGS = ("base",)
"""Top-level YAML files that are not runs but the base of others."""


@cache
def packaged_connectors() -> Mapping[str, Sequence[str]]:
    """Return type -> options of the packaged connectors; each YAML declares all options of its class."""
    from omegaconf import OmegaConf

    connectors = [OmegaConf.load(file) for file in sorted(FOLDER.glob("model/connector/*.yaml"))]
    return {connector.type: list(connector.options) for connector in connectors}


def run_names() -> list[str]:
    """Return the names of the packaged runs."""
    return [name for name in packaged_names("vlm.config", ".", ".yaml") if name not in NON_RUN_CONFIGS]


def group_names() -> list[str]:
    """Return the packaged groups, such as `trainer/deepspeed`: every folder with YAML files."""
    folders = {file.parent.relative_to(FOLDER) for file in FOLDER.glob("*/**/*.yaml")}
    return [folder.as_posix() for folder in sorted(folders)]


def packaged_names(package: str, folder: str, suffix: str) -> list[str]:
    """Return the names of the packaged files of a folder, without their suffix."""
    files = resources.files(package).joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix))


def read_run_description(run: str) -> str:
    """Return the comment at the head of a shipped run's YAML; empty for a run of the user's own."""
    if not (file := FOLDER / f"{run}.yaml").is_file():
        return ""
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def read_run_summary(run: str) -> str:
    """Return the first statement of a run's description, without citations."""
    return SUMMARY_END.split(CITATION.sub("", read_run_description(run)), maxsplit=1)[0]
