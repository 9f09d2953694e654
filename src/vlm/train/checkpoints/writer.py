"""Writes folders of a run so that each is either complete or absent: checkpoints, `best` and `final`.

A folder is written in `unfinished/` of the run directory, flushed to the disk, and renamed when every rank is done. If
a rank cannot write, all ranks are told, and earlier folders remain unchanged. Large files can be written in the
background (`write_queue.py`); the folder is finished when all ranks have written them.
"""

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

from vlm.checks.disk import FULL_ERRORS, format_bytes, free_bytes, is_write_error, mount_point
from vlm.train.checkpoints.files import UNFINISHED, flush, flush_folder, publish, remove_if_empty, restore_replaced
from vlm.train.checkpoints.groups import group_by_leaders, rank_and_world_size
from vlm.train.checkpoints.manifest import MANIFEST, FileRecord, Manifest, hash_file, list_files
from vlm.train.checkpoints.write_queue import WriteQueue
from vlm.train.distributed import all_gather_objects, barrier

VISIBLE_WITHIN = 60.0
"""Seconds within which a rank must see the files of another rank; NFS caches the names in a folder for 30 to 60."""


class SaveError(OSError):
    """A folder of a run could not be written; every rank raises it, with the same message."""


class OutOfStepError(ValueError):
    """A rank failed within a library's own exchange with the others, who wait there: the run cannot continue."""


class HashedFile:
    """A file that is hashed while it is written. `write` never raises: libraries that call it from C++ would abort."""

    def __init__(self, path: Path):
        self.path, self.size, self.digest = path, 0, xxhash.xxh3_128()
        self.error: OSError | None = None
        self.file = path.open("wb")

    def write(self, data: Any) -> int:
        """Write bytes; after an error, which `close` raises, do nothing."""
        count = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.digest.update(data)
            self.size += count
        return count

    def flush(self) -> None:
        """Do nothing: `close` writes what is left."""

    def close(self) -> FileRecord:
        """Return size and hash of the written file.

        Raises:
            OSError: the file could not be written; its incomplete content is removed to free the space.
        """
        try:
            self.file.close()
        except OSError as error:
            self.error = self.error or error
        if self.error is not None:
            self.path.unlink(missing_ok=True)
            raise self.error
        return FileRecord(self.size, self.digest.hexdigest())


def save_hashed(state: object, path: Path, *, zipped: bool = True) -> FileRecord:
    """Write an object as `torch.save` does, and return size and hash of the file.

    Raises:
        OSError: the file could not be written, and is removed.
    """
    file = HashedFile(path)
    try:
        torch.save(state, cast(IO[bytes], file), _use_new_zipfile_serialization=zipped)
    finally:
        record = file.close()
    return record


class FolderWriter:
    """Writes one folder. Every rank makes, begins and finishes a writer.

    Args:
        target: the folder, directly in the run directory.
        is_leader: whether this rank makes, renames and removes folders: the first rank, or the first of each node if
            nodes have their own disks (`trainer.save_on_each_node`).
        is_first_of_node: whether this rank flushes what its node has written.
        in_background: whether a thread writes the large files, see `WriteQueue`.

    Attributes:
        folder: where to write in the meantime.
    """

    def __init__(self, target: Path, *, is_leader: bool, is_first_of_node: bool, in_background: bool = False):
        self.target, self.is_leader, self.is_first_of_node = target, is_leader, is_first_of_node
        self.folder = target.parent / UNFINISHED / target.name
        self.records: dict[str, FileRecord] = {}
        self.error: BaseException | None = None
        self.num_bytes = 0
        self.group = group_by_leaders(is_leader=is_leader)
        self.queue = WriteQueue(in_background=in_background)

    def begin(self, num_bytes: int) -> None:
        """Make the folder, and remove leftovers of a killed run.

        Args:
            num_bytes: about how many bytes this rank will write.

        Raises:
            SaveError: there is too little space, or nothing can be written.
        """
        self.num_bytes = sum(self.group.gather(num_bytes))
        with self.recording():
            if self.is_leader:
                self._remove_waste()
                if self.num_bytes > free_bytes(self.target.parent):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.folder.mkdir(parents=True)
        self._agree()
        with self.recording():
            self._require_visible()
        self._agree()

    def _remove_waste(self) -> None:
        restore_replaced(self.target.parent)
        kind = self.target.name.partition("-")[0]
        for waste in self.folder.parent.glob(f"{kind}*"):
            shutil.rmtree(waste)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep an error of writing instead of raising it, so that all ranks continue to make the same calls."""
        try:
            yield
        except BaseException as error:  # torch's distributed checkpoint derives its error from nothing narrower
            if isinstance(error, OutOfStepError) or not is_write_error(error):
                raise
            self.error = self.error or error

    def save(self, state: object, path: Path, *, zipped: bool = True) -> None:
        """Write an object as `torch.save` does; after an error, do nothing. `path` is within `folder`."""
        state = self.queue.hold(state)

        def write() -> None:
            """Write the file, in this thread or another."""
            if self.error is None:
                with self.recording():
                    self.records[path.relative_to(self.folder).as_posix()] = save_hashed(state, path, zipped=zipped)

        self.queue.add(write)

    def write(self, write: Callable[[], object], files: str) -> None:
        """Call `write` to write this rank's files, which match a pattern within `folder`; after an error, do nothing.

        What it writes must not change while the run continues, see `WriteQueue.hold`.
        """

        def write_and_hash() -> None:
            """Write and hash the files, in this thread or another."""
            if self.error is not None:
                return
            with self.recording():
                write()
                for path in self.folder.glob(files) if self.queue.in_background else ():
                    flush(path)
                    self.records[path.relative_to(self.folder).as_posix()] = hash_file(path)

        self.queue.add(write_and_hash)

    def is_written(self) -> bool:
        """Return whether all ranks have written their files, so that `finish` need not wait; every rank calls this."""
        return all(all_gather_objects(self.queue.is_done()))

    def finish(self, step: int | None = None) -> None:
        """Flush the files, and rename the folder; a checkpoint, which has a `step`, gets its manifest.

        Raises:
            SaveError: a rank could not write. Earlier folders are unchanged.
        """
        self.queue.wait()
        self._agree()  # every rank has written what it has
        with self.recording():
            if self.is_first_of_node:
                flush_folder(self.folder)
        self._agree()
        if step is not None:
            self._write_manifest(step)
        self._agree()
        with self.recording():
            if self.is_leader:
                publish(self.folder, self.target)
        self._agree()

    def _write_manifest(self, step: int) -> None:
        """Hash the files that are not hashed yet, each rank a share, and write the manifest."""
        files: dict[str, FileRecord] = {}
        for records in self.group.gather(self.records):
            files |= records
        names = sorted(set(chain(*self.group.gather(list_files(self.folder)))))  # each rank sees its own at once
        with self.recording():
            self._require_visible(*names)
            share = self.group.take_share([name for name in names if name not in files])
            self.records = {name: hash_file(self.folder / name) for name in share}
        for records in self.group.gather(self.records):
            files |= records
        with self.recording():
            if self.is_leader and self.error is None:
                _, world_size = rank_and_world_size()
                Manifest(step, world_size, files).write(self.folder)
                flush(self.folder / MANIFEST)
                flush(self.folder)

    def _require_visible(self, *names: str) -> None:
        """Wait until this rank sees these files of the folder; network file systems show new names late.

        Raises:
            SaveError: it does not see them in time.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN
        for path in (self.folder, *(self.folder / name for name in names)):
            while not path.exists():
                if time.monotonic() > deadline:
                    raise SaveError(
                        f"{path} was written by another rank, and {socket.gethostname()} cannot read it. Choose a "
                        "trainer.output_dir that all nodes share, or set trainer.save_on_each_node=true"
                    )
                time.sleep(0.1)

    def _agree(self) -> None:
        """Raise SaveError on all ranks if one of them has an error; unfinished files are removed."""
        errors = [error for error in all_gather_objects(self._describe_error()) if error is not None]
        if not errors:
            return
        if self.is_leader:
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_if_empty(self.folder.parent)
        barrier()
        raise SaveError(errors[0])

    def _describe_error(self) -> str | None:
        error = self.error
        if error is None or isinstance(error, SaveError):
            return error and str(error)
        folder = self.target.parent
        free = free_bytes(folder)
        if getattr(error, "errno", None) not in FULL_ERRORS and free >= self.num_bytes:
            return f"{self.target} could not be saved: {error}. Earlier checkpoints are unchanged"
        quota = ", so a quota may be used up" if free >= self.num_bytes else ""
        return (
            f"{self.target} could not be saved: the disk {mount_point(folder)} is full. {format_bytes(self.num_bytes)} "
            f"are needed and {format_bytes(free)} are free{quota}. Free some space. Earlier checkpoints are unchanged"
        )
