"""The manifest of a checkpoint: size and hash of each of its files. A checkpoint that has one was written to its end.

Hashes are XXH3 (128 bits), which is faster than disks. They detect damage, but do not protect against manipulation.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 22
"""Bytes that are read at once."""

UNVERIFIED_MARK = "complete"
"""The empty file with which earlier versions, which wrote no manifest, marked a complete checkpoint."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes, and hash as hexadecimal digits, of a file of a checkpoint."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint.

    Attributes:
        step: the optimiser step after which it was written.
        world_size: the number of ranks that wrote it.
        files: path within the checkpoint -> size and hash of the file.
    """

    step: int
    world_size: int
    files: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def write(self, checkpoint: Path) -> None:
        """Write the manifest, with a hash of its own."""
        (checkpoint / MANIFEST).write_text(_with_hash({"format": FORMAT, **asdict(self)}), encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of a later version.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text)["content"]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing: the checkpoint is not complete") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if text != _with_hash(content):
        raise ValueError(f"{MANIFEST} has changed since it was written: its hash differs")
    if content["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has format {content['format']}; this version of vlm reads {FORMAT}")
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(content["step"], content["world_size"], files)


def _with_hash(content: dict[str, object]) -> str:
    """Return the text of a manifest. It is canonical, so that a change of any byte is detected."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return json.dumps({"content": content, "xxh3_128": digest}, indent=1, sort_keys=True) + "\n"


def is_unverified(checkpoint: Path) -> bool:
    """Return whether a checkpoint is a complete one of an earlier version, which has no manifest."""
    return (checkpoint / UNVERIFIED_MARK).is_file() and not (checkpoint / MANIFEST).exists()


def looks_whole(checkpoint: Path) -> bool:
    """Return whether all files of a checkpoint exist with the right size; only the manifest is read."""
    if is_unverified(checkpoint):
        return True
    try:
        files = read_manifest(checkpoint).files
    except ValueError:
        return False
    return not find_file_problems(checkpoint, files, hashes=False)


def find_file_problems(checkpoint: Path, files: dict[str, FileRecord], *, hashes: bool = True) -> list[str]:
    """Return what is wrong with these files of a checkpoint; without `hashes`, only sizes are compared."""
    problems = []
    for name, expected in files.items():
        try:
            size = (checkpoint / name).stat().st_size
            if size != expected.size:
                problems.append(f"{name} has {size:,} bytes instead of {expected.size:,}")
            elif hashes and hash_file(checkpoint / name) != expected:
                problems.append(f"{name} has changed since it was written: its hash differs")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def hash_file(path: Path) -> FileRecord:
    """Return size and hash of a file."""
    digest, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(CHUNK)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def list_files(folder: Path) -> list[str]:
    """Return all files of a folder, recursively, as sorted relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
