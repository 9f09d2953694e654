"""Whether a name can refer to a checkpoint: a folder with a `config.json`, or a name on the Hub. Imports no torch."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""The form of a repository name."""


def is_hub_name(name: str) -> bool:
    """Return whether a name that is not a folder has the form of a repository name, `owner/name`."""
    return HUB_NAME.fullmatch(name) is not None


def missing_folder(label: str) -> str:
    """Return the message for a name that is neither a folder nor a repository name."""
    return f"{label}: no such folder (seen from {Path.cwd()}), nor a name on the Hub"


def checkpoint_problem(name: str, key: str | None = None) -> str | None:
    """Return why a name is no checkpoint, in words; None for a folder with a `config.json` and for a name on the Hub.

    Args:
        name: the folder or the name on the Hub.
        key: the option that gave the name, for the message.
    """
    folder = Path(name)
    label = f"{key}={name}" if key else name
    if folder.joinpath("config.json").is_file():
        return None
    if not folder.exists():
        return None if is_hub_name(name) and not _is_beside_runs(folder) else missing_folder(label)
    if (final := folder / "final").is_dir():
        return f"{label} has no config.json: it is a run directory, and its model is {final}"
    return f"{label} has no config.json; the complete model of a run is in its folder `final`"


def _is_beside_runs(folder: Path) -> bool:
    """Return whether a missing folder would be among runs or checkpoints, so that the name is not meant for the Hub."""
    return any(next(folder.parent.glob(f"*/{name}"), None) is not None for name in ("config.yaml", "config.json"))
