"""Every signal to each process of a launch: the run saves, all of its processes end, and the same command goes on."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.forked import CPU_ONLY
from tests.torture.runs import KINDS, check_ended, different_weights, final_weights, train
from tests.waiting import HANG, wait_until
from vlm.train.monitor.callbacks import read_metrics

MARK = "TORTURE_MARK"
SAVED = 75


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Return the processes that have a mark in their environment -> their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            is_dead = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue  # it has ended, or is another user's
        environment = dict(line.split("=", 1) for line in lines if "=" in line)
        if environment.get(MARK) == mark and not is_dead:
            found[int(process.name)] = environment
    return found


def find_target(mark: str, launcher: int, target: str) -> int:
    """Return the process that is meant: the launcher, or a rank."""
    if target == "launcher":
        return launcher
    ranks = [pid for pid, environment in marked(mark).items() if environment.get("RANK") == target]
    return min(ranks)  # its data workers come later


@pytest.fixture(scope="module")
def words(common: list[str], labelled: Path) -> list[str]:
    folder = Path("unused")
    command = KINDS["ZeRO-2, packed"].command(common, labelled, folder)
    return [word for word in command if not word.startswith("trainer.output_dir")] + ["trainer.max_steps=40"]


@pytest.fixture(scope="module")
def quiet(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "quiet"
    check_ended(train([*words, f"trainer.output_dir={folder}"], 2))
    return folder


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("target", ["launcher", "0", "1"])
def test_a_signal_saves_the_run_and_leaves_no_process(
    words: list[str], quiet: Path, tmp_path: Path, number: signal.Signals, target: str
):
    mark = uuid.uuid4().hex
    command = [*words, f"trainer.output_dir={tmp_path / 'run'}"]
    environment = {**os.environ, **CPU_ONLY, MARK: mark}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "vlm", "launch", "--nproc", "2", "--", *command],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 1, launcher)
    os.kill(find_target(mark, launcher.pid, target), number)
    assert launcher.wait(HANG) == SAVED, (tmp_path / "log").read_text()[-3000:]
    assert marked(mark) == {}
    check_ended(train(command, 2))
    assert different_weights(final_weights(quiet), final_weights(tmp_path / "run")) == []
