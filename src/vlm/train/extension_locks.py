"""Locks that ended processes left in torch's folder of compiled extensions; whoever needs such one waits for ever.

DeepSpeed compiles its operations at their first use, under a file `lock` that torch creates and removes. A process that
is killed in between leaves the file, and its compilers at work.
"""

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
"""File systems on which no other machine can hold a lock."""


def extensions_folder() -> Path:
    """Return the folder below which torch compiles extensions."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) if folder else Path(cache, "torch_extensions")


def release_stale_locks(root: Path) -> None:
    """Remove locks that no process holds, and end the compilers that their owners left; called once a machine.

    On a shared disk the owner may be on another machine: there a lock is only pointed out.
    """
    for lock in root.rglob("lock") if root.is_dir() and Path("/proc/self/fd").is_dir() else ():
        with suppress(FileNotFoundError):  # it was released meanwhile
            if lock.stat().st_uid != os.getuid() or is_open(lock):
                continue
            if file_system_of(lock) not in LOCAL_FILE_SYSTEMS:
                log.warning(
                    "%s: no process of this machine holds this lock. Delete it unless another machine is compiling "
                    "there; otherwise this run waits for it forever.",
                    lock,
                )
                continue
            for pid in processes_in(lock.parent):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            lock.unlink()
            log.info("Removed %s, left behind by a process that was killed while compiling", lock)


def is_open(file: Path) -> bool:
    """Return whether a process of this user has a file open."""
    target = str(file.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == target:
                return True
    return False


def processes_in(folder: Path) -> list[int]:
    """Return the processes of this user whose working directory is a folder, such as compilers; no terminal's shell."""
    target, pids = str(folder.resolve()), []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            pid = int(link.parts[2])
            if os.readlink(link) == target and os.getsid(pid) != pid:
                pids.append(pid)
    return pids


def file_system_of(path: Path) -> str:
    """Return the kind of the file system that a path is on, such as `ext4` or `nfs4`; empty where that is unknown."""
    kind, longest, resolved = "", "", path.resolve()
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, name, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if resolved.is_relative_to(mount) and len(mount) >= len(longest):
            kind, longest = name, mount
    return kind
