"""A small model, handed on between numbers of ranks and ways to share it."""

import json
from pathlib import Path

import pytest

from tests.forked import run_ranks

Differences = dict[tuple[str, str], float]
"""`(2-zero3, 1-alone)`: the ranks and the way that saved, those that went on -> the largest difference of weights."""


@pytest.fixture(scope="session")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Differences:
    """What `rank_programs` found, compared with runs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("worlds")
    for ranks in (2, 1, 3):
        for done in run_ranks("tests.train.checkpoints.rank_programs", [str(folder)], ranks):
            assert done.returncode == 0, done.stderr[-3000:]
    found: Differences = {}
    for file in folder.glob("differences*"):
        for pair, difference in json.loads(Path(file).read_text()).items():
            source, target = pair.split()
            found[source, target] = difference
    return found
