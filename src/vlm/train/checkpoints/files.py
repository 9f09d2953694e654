"""Files and folders of a run that are written whole: flushed to the disk, then renamed."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

UNFINISHED = "unfinished"
"""The folder of a run directory in which new folders are written; leftovers of a killed run in it are not used."""

REPLACED, REMOVED = ".replaced", ".removed"
"""Endings in `unfinished/` of a folder that is being replaced, and of a folder that is being removed."""

CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors of file systems that cannot flush folders."""


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in CANNOT_FLUSH):
            raise
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush a folder and all of its files to the disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file atomically: if the process is killed, either the old or the new text is complete."""
    unfinished = path.with_name(f".{path.name}.{UNFINISHED}")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    unfinished.replace(path)


def publish(folder: Path, target: Path) -> None:
    """Move a folder from `unfinished/` to its final name, replacing a folder of this name."""
    replaced = folder.with_name(f"{target.name}{REPLACED}")
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    remove_if_empty(folder.parent)


def restore_replaced(run_directory: Path) -> None:
    """Restore folders that a run was about to replace when it was killed."""
    for replaced in run_directory.joinpath(UNFINISHED).glob(f"*{REPLACED}"):
        target = run_directory / replaced.name.removesuffix(REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                replaced.rename(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder of a run directory so that it is never half removed under its own name."""
    unfinished = folder.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    removed = unfinished / f"{folder.name}{REMOVED}"
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
    remove_if_empty(unfinished)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()
