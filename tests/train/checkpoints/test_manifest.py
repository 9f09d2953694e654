"""The manifest says what a checkpoint holds: every way to damage a file of it is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.train.checkpoints.find import find_problems_together
from vlm.train.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    hash_file,
    list_files,
    looks_whole,
    read_manifest,
)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def fill_half_with_zeros(file: Path) -> None:
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes(len(content) - half))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink,
    "zeroed": fill_half_with_zeros,
    "flipped": flip_a_bit,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 40)
    (folder / "global_step4" / "states").write_bytes(b"states" * 100)
    Manifest(4, 2, {name: hash_file(folder / name) for name in list_files(folder)}).write(folder)
    return folder


def test_a_checkpoint_that_holds_what_was_written_has_no_problems(checkpoint: Path):
    assert find_problems_together(checkpoint) == []
    assert looks_whole(checkpoint)
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.world_size, manifest.num_bytes) == (4, 2, 256 * 40 + 600)
    (checkpoint / "a note of the user's").write_text("keep this one")
    assert find_problems_together(checkpoint) == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights", "global_step4/states"])
def test_every_damage_to_a_file_is_found_and_named(checkpoint: Path, name: str, damage: str):
    DAMAGES[damage](checkpoint / name)
    (problem,) = find_problems_together(checkpoint)
    assert problem.startswith(f"{name} ")
    assert looks_whole(checkpoint) == (damage in ("zeroed", "flipped"))  # sizes alone do not tell


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_found(checkpoint: Path, damage: str):
    DAMAGES[damage](checkpoint / MANIFEST)
    (problem,) = find_problems_together(checkpoint)
    assert MANIFEST in problem
    assert not looks_whole(checkpoint)


def test_every_bit_of_a_manifest_counts(checkpoint: Path):
    content = (checkpoint / MANIFEST).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (checkpoint / MANIFEST).write_bytes(flipped)
        assert find_problems_together(checkpoint), flipped[place - 20 : place + 20]


def test_a_manifest_of_a_later_version_is_refused(checkpoint: Path):
    whole = json.loads((checkpoint / MANIFEST).read_text())
    whole["content"]["format"] = 2
    (checkpoint / MANIFEST).write_text(json.dumps(whole))
    (problem,) = find_problems_together(checkpoint)
    assert "its hash differs" in problem


def test_a_checkpoint_of_an_earlier_version_has_nothing_to_be_held_against(checkpoint: Path):
    (checkpoint / MANIFEST).unlink()
    assert find_problems_together(checkpoint) == [f"{MANIFEST} is missing: the checkpoint is not complete"]
    (checkpoint / "complete").touch()
    assert find_problems_together(checkpoint) == []
