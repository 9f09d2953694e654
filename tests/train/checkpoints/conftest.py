"""A small model, handed on between numbers of ranks and ways to share it."""

import json
from pathlib import Path

import pytest

from tests.forked import run_ranks

Differences = dict[tuple[str, str], float]
"""`(2-zero3, 1-alone)`: the ranks and the way that saved, those that went on -> the largest difference of weights."""


@pytest.fixture(scope="session")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Differences:
    """What `rank_programs` found on one rank and two, compared with runs that nothing disturbed."""
    return find_differences(tmp_path_factory.mktemp("worlds"), 1, 2, 1)


def find_differences(folder: Path, *numbers_of_ranks: int) -> Differences:
    """Run `rank_programs` on so many ranks, one after the other; each goes on from what those before have saved."""
    for ranks in numbers_of_ranks:
        for done in run_ranks("tests.train.checkpoints.rank_programs", [str(folder)], ranks):
            assert done.returncode == 0, done.stderr[-3000:]
    found: Differences = {}
    for file in folder.glob("differences*"):
        for pair, difference in json.loads(Path(file).read_text()).items():
            source, target = pair.split()
            found[source, target] = difference
    return found
