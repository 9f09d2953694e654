"""What a checkpoint is, from its files: whether there is one, has prediction heads, is an adapter. Imports no torch.

Commands ask here first, so that a mistake is told at once and not after seconds of imports.
"""

import re
from pathlib import Path

from vlm.checks.checkpoint_files import read_object
from vlm.config.derived import BASE_FILE

PREDICTION_MODEL_TYPE = "vlm_prediction"
"""The `model_type` of our models with prediction heads."""

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


def check_checkpoint(name: str | Path, *, heads: bool | None = None, adapter: bool | None = None) -> None:
    """Refuse a name that is no checkpoint, or a folder of an unexpected kind; of a name on the Hub only its form.

    Args:
        name: the folder or the name on the Hub.
        heads: whether the command needs prediction heads (True) or works without them only (False).
        adapter: whether the command needs an adapter on a base (True) or a complete model (False).

    Raises:
        ValueError: with what to do instead.
    """
    folder = Path(name)
    if problem := checkpoint_problem(str(name)):
        raise ValueError(problem)
    if not folder.is_dir():
        return
    if heads is not None:
        kind = read_object(folder / "config.json").get("model_type")
        check_heads(name, found=kind == PREDICTION_MODEL_TYPE, expected=heads)
    if adapter is not None:
        check_adapter(name, found=is_adapter_folder(folder), expected=adapter)


def check_heads(name: str | Path, *, found: bool, expected: bool) -> None:
    """Raise ValueError if a model has prediction heads that a command does not expect, or lacks those that it does."""
    if found and not expected:
        raise ValueError(f"{name} has prediction heads: ask it with vlm predict, or vlm.Predictor")
    if expected and not found:
        raise ValueError(f"{name} has no prediction heads: ask it with vlm generate")


def check_adapter(name: str | Path, *, found: bool, expected: bool) -> None:
    """Raise ValueError if a checkpoint is an adapter where an export needs a complete model, or the other way round."""
    if found and not expected:
        raise ValueError(f"{name} is an adapter; merge it into its base first: vlm merge-lora {name} MERGED")
    if expected and not found:
        raise ValueError(
            f"{name} has no adapter: --format vllm-lora exports the `final` of a LoRA run; use --format llava"
        )


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a checkpoint's folder is complete only together with its base."""
    return (folder / BASE_FILE).is_file()


def check_final_folder(folder: Path) -> None:
    """Refuse to publish what is no finished checkpoint, complete or on a base; the error says what to give instead."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (seen from {Path.cwd()})")
    if (folder / "trainer_state.json").is_file():
        raise ValueError(
            f"{folder} is an intermediate checkpoint, for resuming. Finish the run "
            f"(the same command with trainer.output_dir={folder.parent}), then publish its folder final"
        )
    check_checkpoint(folder)


def _is_beside_runs(folder: Path) -> bool:
    """Return whether a missing folder would be among runs or checkpoints, so that the name is not meant for the Hub."""
    return any(next(folder.parent.glob(f"*/{name}"), None) is not None for name in ("config.yaml", "config.json"))
