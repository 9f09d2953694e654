"""Every file of a checkpoint, damaged in every way: the checkpoint before is taken, or the run is refused."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.torture.runs import KINDS, Kind, check_ended, different_weights, final_weights, train
from vlm.train.checkpoints.find import find_whole_checkpoint

SEED = int(os.environ.get("TORTURE_SEED", "0"))
DAMAGED = ("padded", "head", "stream", "ZeRO-2, packed", "ZeRO-3, packed")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    """Write zeros over the second half, as a file system may leave a file that was not flushed."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))


def flip(file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    bit = random.Random(f"{SEED} {file.name}").randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, Path.unlink, zero, flip)


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that are not empty, relative to it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    return [path.relative_to(checkpoint) for path in files]


def damaged_copies(run: Path, newest: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield copies of a run, each with one file of its newest checkpoint damaged in one way."""
    for file in files_of(newest):
        for damage in DAMAGES:
            copy = folder / f"{damage.__name__}-{str(file).replace('/', '-')}"
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("final"))
            before = (copy / newest.name / file).read_bytes()
            damage(copy / newest.name / file)
            damaged = copy / newest.name / file
            if damaged.exists() and damaged.read_bytes() == before:  # its second half was zeros already
                continue
            yield f"{damage.__name__} {file}", copy
            shutil.rmtree(copy)


@pytest.fixture(scope="module")
def trained(common: list[str], labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Return the directory of a run of a kind, with two checkpoints or more; each is made once."""
    folder = tmp_path_factory.mktemp("trained")

    def get(kind: Kind) -> Path:
        run = folder / kind.folder
        if not run.exists():
            check_ended(train(kind.command(common, labelled, run), kind.ranks))
        return run

    return get


@pytest.mark.parametrize("kind", [pytest.param(KINDS[name], id=name, marks=pytest.mark.torture if n else ())
                                  for n, name in enumerate(DAMAGED)])  # fmt: skip
def test_a_damaged_checkpoint_is_set_aside(trained: Callable[[Kind], Path], tmp_path: Path, kind: Kind):
    run = trained(kind)
    newest = find_whole_checkpoint(run)
    assert newest is not None
    passed_for_whole = [
        name for name, copy in damaged_copies(run, newest, tmp_path)
        if (found := find_whole_checkpoint(copy)) is None or found.name == newest.name or (copy / newest.name).exists()
    ]  # fmt: skip
    assert passed_for_whole == []


@pytest.mark.torture
@pytest.mark.parametrize("kind", [pytest.param(KINDS[name], id=name) for name in DAMAGED])
def test_a_run_goes_on_from_the_checkpoint_before(
    trained: Callable[[Kind], Path], common: list[str], labelled: Path, tmp_path: Path, kind: Kind
):
    """Damaged in one way after the other, each in another file; the weights in the end are those of before."""
    run = trained(kind)
    expected, newest = final_weights(run), find_whole_checkpoint(run)
    assert newest is not None
    files = files_of(newest)
    for number, damage in enumerate(DAMAGES):
        copy = tmp_path / str(number)
        command = kind.command(common, labelled, copy)
        check_ended(train(command, kind.ranks))
        shutil.rmtree(copy / "final")
        damage(copy / newest.name / files[number * len(files) // len(DAMAGES)])
        check_ended(train(command, kind.ranks))
        assert different_weights(expected, final_weights(copy)) == [], damage.__name__
