"""Runs that are stuck end on all ranks, with their stacks; long work that gets on does not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import CPU_ONLY, ROOT, find_free_port
from tests.waiting import wait_until

RANK = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from vlm.train.guards.watchdog import Watchdog

kind, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=100))
watchdog = Watchdog(folder, 2.0, dist.get_rank(), dist.get_world_size())
watchdog.start()
folder.joinpath(f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
if kind == "slow" and dist.get_rank() == 0:
    for _ in range(25):  # for longer than the other one may be stuck for
        watchdog.mark()
        time.sleep(0.2)
if kind == "saving" and dist.get_rank() == 0:
    with (folder / "weights").open("wb") as file:
        for _ in range(25):
            file.write(b"x")
            file.flush()
            time.sleep(0.2)
if kind == "stopped" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
if kind == "stuck" and dist.get_rank() == 1:
    time.sleep(100)
dist.all_reduce(torch.zeros(1))
watchdog.stop()
dist.barrier()
"""


def start(kind: str, folder: Path) -> list[subprocess.Popen[str]]:
    port, ranks = find_free_port(), []
    for rank in range(2):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", RANK, kind, str(folder)]
        environment = {**os.environ, **CPU_ONLY, **world}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    return ranks


@pytest.mark.parametrize("kind", ["stuck", "stopped"])
def test_a_rank_that_is_stuck_ends_all(tmp_path: Path, kind: str):
    """A stopped process writes no stack; another rank kills it."""
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "rank-0.txt").write_text("of an earlier run")
    ranks = start(kind, tmp_path)
    messages = [rank.communicate(timeout=120)[1] for rank in ranks]
    expected = [76, 76] if kind == "stuck" else [76, -signal.SIGKILL]
    assert [rank.returncode for rank in ranks] == expected, messages
    stacks = (tmp_path / "stuck" / "rank-0.txt").read_text()
    assert "all_reduce" in stacks
    assert "all_reduce" in messages[0]
    assert (tmp_path / "stuck" / "rank-1.txt").exists() == (kind == "stuck")


@pytest.mark.parametrize("kind", ["slow", "saving"])
def test_work_of_one_rank_is_progress_of_all(tmp_path: Path, kind: str):
    ranks = start(kind, tmp_path)
    messages = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], messages
    assert not (tmp_path / "stuck").exists()
    assert not (tmp_path / "heartbeats").exists()


WORKER = """
import sys, time
from vlm.cli.train import main
from vlm.data import dataset

encode, number = dataset.encode_sample, 0


def hang(source, sample):
    global number
    number += 1
    if number > 6:
        time.sleep(1000)
    return encode(source, sample)


dataset.encode_sample = hang
main(sys.argv[1:])
"""


def test_a_data_worker_that_hangs_ends_the_run(common: list[str], tmp_path: Path):
    words = [
        "-cn", "pretrain-smol", *common, "trainer.dataloader_num_workers=1", "trainer.per_device_train_batch_size=2",
        "trainer.stuck_after=4", f"trainer.output_dir={tmp_path}", "trainer.num_samples=0",
    ]  # fmt: skip
    from tests.forked import run_forked

    (done,) = run_forked(["-c", WORKER, *words])
    assert done.returncode == 76, done.stderr[-3000:]
    assert "stuck and ends" in done.stderr + done.stdout
    assert "dataloader.py" in (tmp_path / "stuck" / "rank-0.txt").read_text()


def test_heartbeats_say_who_a_rank_is(tmp_path: Path):
    from vlm.train.guards.watchdog import Watchdog

    watchdog = Watchdog(tmp_path, 0.5, 0, 1)
    watchdog.start()
    file = tmp_path / "heartbeats" / "rank-0.json"
    wait_until(file.exists)
    for _ in range(10):
        watchdog.mark()
        time.sleep(0.1)
    beat = json.loads(file.read_text())
    assert beat["pid"] == os.getpid()
    assert beat["count"] > 0
    watchdog.stop()
    assert not file.exists()
