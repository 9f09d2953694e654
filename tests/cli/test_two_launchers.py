"""Two launchers on this machine, as on two, each with one rank: they meet, train together, and end together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import newest_checkpoint
from tests.forked import CPU_ONLY, find_free_port
from tests.waiting import HANG, wait_until

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def launcher(name: str, rank: int, port: int, folder: Path) -> list[str]:
    """The words before those of the run."""
    if name == "vlm":
        where = ["--nodes", "2", "--node-rank", str(rank), "--rendezvous", f"127.0.0.1:{port}"]
        return [sys.executable, "-m", "vlm", "launch", "--nproc", "1", *where, "--"]
    if name == "torchrun":
        where = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x"]
        return [str(BIN / "torchrun"), *where, "--nproc-per-node", "1", "-m", "vlm"]
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    where = ["--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [str(BIN / "deepspeed"), "--hostfile", str(folder / "hosts"), *where, "--module", "vlm"]


def start(name: str, words: list[str], folder: Path, *places: Path) -> list["subprocess.Popen[bytes]"]:
    """Start both; `places` are working directories of their own."""
    port = find_free_port()
    environment = {**os.environ, **CPU_ONLY, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    commands = [[*launcher(name, rank, port, folder), *words] for rank in (0, 1)]
    return [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=place)
        for command, place in zip(commands, places or (None, None), strict=True)
    ]


@pytest.mark.parametrize("name", ["vlm", "torchrun", "deepspeed"])
def test_they_train_together(name: str, common: list[str], tmp_path: Path):
    words = ["-cn", "pretrain-smol", *common, "trainer.max_steps=1", f"trainer.output_dir={tmp_path / 'run'}"]
    started = start(name, words, tmp_path)
    assert [process.wait(HANG) for process in started] == [0, 0]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert '"world_size": 2' in (tmp_path / "run" / "versions.json").read_text()


def test_a_signal_to_one_ends_both_with_a_checkpoint(common: list[str], tmp_path: Path):
    run = tmp_path / "run"
    words = ["-cn", "pretrain-smol", *common, "trainer.max_steps=100000", f"trainer.output_dir={run}"]
    started = start("vlm", [*words, "trainer.save_strategy=no"], tmp_path)
    wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), *started)
    started[1].send_signal(signal.SIGUSR1)
    assert [process.wait(HANG) for process in started] == [75, 75]
    assert newest_checkpoint(run).is_dir()


@pytest.mark.parametrize("sharding", ["trainer.deepspeed=zero3", "trainer.deepspeed=null"])
def test_each_disk_has_the_whole_model(sharding: str, common: list[str], tmp_path: Path):
    """Where nodes share no disk, a run directory is on each."""
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    words = ["-cn", "pretrain-smol", *common, "trainer.max_steps=1", "trainer.output_dir=run", sharding]
    words += ["trainer.save_strategy=steps", "trainer.save_steps=1"]
    started = start("vlm", [*words, "trainer.save_on_each_node=true"], tmp_path, *places)
    assert [process.wait(HANG) for process in started] == [0, 0]
    first, second = (load_file(place / "run" / "final" / "model.safetensors") for place in places)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert sum(tensor.numel() for tensor in second.values()) > 1000
    started = start("vlm", [*words, "trainer.save_on_each_node=true", "trainer.max_steps=2"], tmp_path, *places)
    assert [process.wait(HANG) for process in started] == [0, 0]
    for place in places:
        assert json.loads((place / "run" / "final" / "run.json").read_text())["progress"]["step"] == 2
