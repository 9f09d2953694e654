"""The YAML files of this package: shipped runs, groups and what they hold.

Imports the standard library and OmegaConf.
"""

from importlib import resources
from importlib.resources.abc import Traversable

from omegaconf import OmegaConf

NON_RUN_CONFIGS = ("base",)
"""Top-level YAML files that others build on."""


def packaged_connectors() -> dict[str, list[str]]:
    """Return type -> options of the packaged connectors; each YAML declares all options of its class."""
    folder = resources.files("vlm.config").joinpath("model", "connector")
    texts = [
        folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        for name in packaged_names("vlm.config", "model/connector", ".yaml")
    ]
    return {connector.type: list(connector.options) for connector in map(OmegaConf.create, texts)}


def run_names() -> list[str]:
    """Return the names of the shipped runs."""
    return [name for name in packaged_names("vlm.config", ".", ".yaml") if name not in NON_RUN_CONFIGS]


def group_names() -> list[str]:
    """Return the shipped groups, such as `trainer/deepspeed`: every folder that holds YAML files."""

    def walk(folder: Traversable, path: str) -> list[str]:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
        groups = [path] if path and any(entry.name.endswith(".yaml") for entry in entries) else []
        for entry in entries:
            if entry.is_dir():
                groups += walk(entry, f"{path}/{entry.name}" if path else entry.name)
        return groups

    return walk(resources.files("vlm.config"), "")


def packaged_names(package: str, folder: str, suffix: str) -> list[str]:
    """Return the names of the packaged files of a folder, without their suffix."""
    files = resources.files(package).joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix))


def read_run_description(run: str) -> str:
    """Return the comment at the head of a run's YAML."""
    lines = resources.files("vlm.config").joinpath(f"{run}.yaml").read_text(encoding="utf-8").splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in head)
