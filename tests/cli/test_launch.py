"""`vlm launch`: the ranks that it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import waiting
from tests.forked import CPU_ONLY
from vlm.cli.launch import find_rendezvous, main, make_environments, make_parser, read_nodes
from vlm.clusters.processes import ProcessGroup
from vlm.train.resume.lock import RunLock


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)


def test_ranks_are_numbered_over_machines():
    rendezvous = find_rendezvous("node01:29500", 3, make_parser())
    environments = make_environments(2, 3, 1, rendezvous)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [[environment[name] for name in names] for environment in environments] == [
        ["2", "0", "6", "node01", "29500"],
        ["3", "1", "6", "node01", "29500"],
    ]


def test_nodes_come_from_slurm(monkeypatch: pytest.MonkeyPatch):
    names = {"STEP_ID": "0", "STEP_NUM_NODES": "4", "STEP_NUM_TASKS": "4", "NODEID": "3", "JOB_NODELIST": "n[5-8]"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    parser = make_parser()
    assert read_nodes(parser.parse_args([]), parser) == (4, 3)
    assert find_rendezvous(None, 4, parser)["MASTER_ADDR"] == "n5"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nproc", "2"], "the run is missing"),
        (["--nproc", "0", "--", "-cn", "x"], "--nproc"),
        (["--nproc", "1", "--nodes", "2", "--", "-cn", "x"], "--node-rank is needed, 0 to 1"),
        (["--nproc", "1", "--nodes", "2", "--node-rank", "2", "--", "-cn", "x"], "it is 0 to 1"),
        (["--nproc", "1", "--nodes", "2", "--node-rank", "1", "--", "-cn", "x"], "--rendezvous HOST:PORT is needed"),
        (["--nproc", "1", "--rendezvous", "node01", "--", "-cn", "x"], "as in node01:29500"),
        (["-cn", "pretrain-smol"], "unrecognized arguments|the run is missing"),
    ],
)
def test_what_cannot_be_started_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], named: str):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert any(part in error for part in named.split("|"))


def test_a_run_that_is_refused_is_refused_once():
    done: subprocess.CompletedProcess[str] = waiting.run(
        [sys.executable, "-m", "vlm", "launch", "--nproc", "2", "--", "-cn", "pretrain-smol"]
    )
    assert done.returncode == 1
    assert done.stderr.count("dataset.path: a value is needed") == 1


@pytest.mark.slow
def test_what_rank_0_refuses_is_said_once(common: list[str], tmp_path: Path):
    """The other rank has nothing to say, and waits for nobody."""
    words = ["-cn", "pretrain-smol", *common, f"trainer.output_dir={tmp_path}"]
    with RunLock(tmp_path):
        done = waiting.run([sys.executable, "-m", "vlm", "launch", "--nproc", "2", "--", *words])
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("another run is training in it") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_guard_on_all_ranks_is_the_launchers_exit_code(common: list[str], tmp_path: Path):
    words = ["--poison=2,nan", "-cn", "pretrain-smol", *common, f"trainer.output_dir={tmp_path}"]
    ranks = make_environments(2, 1, 0, find_rendezvous(None, 1, make_parser()))
    environments = [{**rank, **CPU_ONLY} for rank in ranks]
    command = [sys.executable, "-m", "tests.train.guards.poisoned", *words]
    assert ProcessGroup().run(command, environments) == 76
    assert not (tmp_path / "final").exists()
    assert not list(tmp_path.glob("run.lock*"))
