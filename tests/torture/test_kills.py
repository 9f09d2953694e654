"""Runs killed at random moments, and within saves: the same command again, and the weights are those of a quiet run."""

import os
import random
import time
from pathlib import Path

import pytest

from tests.torture.runs import (
    KILL_AT_WRITE,
    KILLED,
    KINDS,
    ONE_RANK,
    TWO_RANKS,
    Kind,
    check_ended,
    different_weights,
    final_weights,
    train,
)

SEED = int(os.environ.get("TORTURE_SEED", "0"))


class Quiet:
    """Undisturbed runs, each made once: their weights, and the seconds that they took."""

    def __init__(self, common: list[str], labelled: Path, folder: Path):
        self.common, self.labelled, self.folder = common, labelled, folder
        self.weights: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}

    def command(self, kind: Kind, folder: Path) -> list[str]:
        return kind.command(self.common, self.labelled, folder)

    def run(self, kind: Kind) -> None:
        if kind.name in self.weights:
            return
        folder = self.folder / kind.folder
        start = time.monotonic()
        check_ended(train(self.command(kind, folder), kind.ranks))
        self.seconds[kind.name] = time.monotonic() - start
        self.weights[kind.name] = final_weights(folder)


@pytest.fixture(scope="module")
def quiet(common: list[str], labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    return Quiet(common, labelled, tmp_path_factory.mktemp("quiet"))


def finish(quiet: Quiet, kind: Kind, folder: Path) -> None:
    """Let a run end; its weights must be those of the quiet one."""
    check_ended(train(quiet.command(kind, folder), kind.ranks))
    assert different_weights(quiet.weights[kind.name], final_weights(folder)) == [], f"{kind.name}, seed {SEED}"


def kill_at_random(quiet: Quiet, kind: Kind, folder: Path, kills: int) -> None:
    """Kill a run again and again at random moments, then let it end; a run that is done before is begun elsewhere."""
    quiet.run(kind)
    chance = random.Random(f"{SEED} {kind.name}")
    attempt = 0
    while kills:
        seconds = chance.uniform(0.05, quiet.seconds[kind.name])
        command, rank = quiet.command(kind, folder / str(attempt)), chance.randrange(kind.ranks)
        ended = train(command, kind.ranks, rank=rank, KILL_AFTER=f"{seconds:.3f}")
        check_ended(ended, *KILLED)
        if any(process.returncode for process in ended):
            kills -= 1
        else:
            finish(quiet, kind, folder / str(attempt))
            attempt += 1
    finish(quiet, kind, folder / str(attempt))


def test_killed_at_random(quiet: Quiet, tmp_path: Path):
    kill_at_random(quiet, KINDS["packed"], tmp_path, 2)


@pytest.mark.torture
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in ONE_RANK])
def test_each_kind_killed_at_random(quiet: Quiet, tmp_path: Path, kind: Kind):
    """Five times each: 65 kills in all."""
    kill_at_random(quiet, kind, tmp_path, 5)


@pytest.mark.torture
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in TWO_RANKS])
def test_two_ranks_killed_at_random(quiet: Quiet, tmp_path: Path, kind: Kind):
    """Four times each: 16 kills of one rank, and with it of the other."""
    kill_at_random(quiet, kind, tmp_path, 4)


def kill_in_saves(quiet: Quiet, kind: Kind, folder: Path, kills: int) -> None:
    """Kill a run before a change of a file of a checkpoint, each time at another change; then let it end."""
    quiet.run(kind)
    counted = folder / "count"
    command = quiet.command(kind, folder / "counted")
    check_ended(train(command, kind.ranks, KILL_AT_WRITE, COUNT_FILE=str(counted)))
    count = int(counted.read_text())
    assert count > 20, "the writes of checkpoints were not counted"
    for number in range(kills):
        run = folder / str(number)
        last = 1 + round((count - 1) * (number + random.Random(f"{SEED} {number}").random()) / kills)
        check_ended(train(quiet.command(kind, run), kind.ranks, KILL_AT_WRITE, KILL_AT=str(last)), *KILLED)
        finish(quiet, kind, run)


def test_killed_in_saves(quiet: Quiet, tmp_path: Path):
    kill_in_saves(quiet, KINDS["padded"], tmp_path, 2)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("kind", "kills"), [pytest.param(KINDS["padded"], 20, id="one rank"), pytest.param(KINDS["head"], 10, id="head"),
                        pytest.param(KINDS["ZeRO-2, packed"], 10, id="ZeRO-2"),
                        pytest.param(KINDS["FSDP2, saved in the background"], 10, id="FSDP2, in the background")],
)  # fmt: skip
def test_killed_in_saves_at_length(quiet: Quiet, tmp_path: Path, kind: Kind, kills: int):
    """50 kills in all."""
    kill_in_saves(quiet, kind, tmp_path, kills)
