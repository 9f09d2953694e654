"""Disks: where a folder lies, how much is free there, and what an error of the file system means. Imports no torch."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
DENIED_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)

FULL_BELOW = 1 << 20
"""A disk with fewer free bytes counts as full if an error does not name the disk."""

WRITE_ERROR = re.compile(r"\(os error \d+\)|inline_container\.cc|PytorchStreamWriter|No space left on device")
"""Texts in errors of libraries that do not write files through Python: safetensors, tokenizers, torch."""


def format_bytes(count: float) -> str:
    """Return a number of bytes in readable form: `12.3 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def nearest_folder(path: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def mount_point(path: Path) -> Path:
    """Return where the disk that a path is on is mounted."""
    folder = nearest_folder(path).resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.is_mount())


def free_bytes(path: Path) -> int:
    """Return how many bytes can be written to the disk that a path is on; quotas are not known."""
    return shutil.disk_usage(nearest_folder(path)).free


def write_problem(folder: Path) -> str | None:
    """Return why a folder, which need not exist yet, cannot be written to, or None if it can."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        return f"{nearest} is a file; a folder is needed"
    if os.access(nearest, os.W_OK | os.X_OK):
        return None
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"{nearest} is on a disk that is mounted read-only ({mount_point(nearest)})"
    return f"you have no permission to write to {nearest}"


def is_write_error(error: BaseException) -> bool:
    """Return whether an error says that a file could not be written, whichever library raised it."""
    return isinstance(error, OSError) or WRITE_ERROR.search(str(error)) is not None


def describe_disk_error(error: OSError, folders: Iterable[Path] = ()) -> str | None:
    """Return which disk is full or cannot be written to, and what to do; None if the error is another one.

    Errors of single writes name no file: then all full disks of `folders` and of temporary files are named.
    """
    if error.errno not in (*FULL_ERRORS, *DENIED_ERRORS):
        return None
    file = None if error.filename is None else Path(os.fsdecode(error.filename))
    if error.errno in DENIED_ERRORS:
        return None if file is None else f"{file} cannot be written ({error.strerror}): choose another folder"
    named = [file] if file is not None else [Path.cwd(), Path(tempfile.gettempdir()), *folders]
    disks = {mount_point(path): free_bytes(path) for path in named}
    full = [f"{disk} ({format_bytes(free)} free)" for disk, free in disks.items() if file or free < FULL_BELOW]
    where = f"while {file} was written" if file is not None else "while a file was written"
    reason = "its quota is used up" if error.errno == errno.EDQUOT else "it is full"
    return f"The disk {' or '.join(full) or 'of this user'}: {reason}, {where}. Free some space and start again"
