"""Runs that are stuck end on all ranks, with their stacks; long work that gets on does not."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.forked import Ended, find_free_port, run_forked
from tests.waiting import wait_until
from vlm.train.guards.watchdog import Watchdog

RANK = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from vlm.train.guards.watchdog import Watchdog

kind, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=100))
watchdog = Watchdog(folder, 3.0, dist.get_rank(), dist.get_world_size())
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


def run_two(kind: str, folder: Path) -> list[Ended]:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    command = ["-c", RANK, kind, str(folder)]
    return run_forked(command, command, environments=[{**world, "RANK": str(rank)} for rank in range(2)])


def test_ranks_that_are_stuck_end(tmp_path: Path):
    """All with their stacks; those of an earlier run mislead nobody."""
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "rank-0.txt").write_text("of an earlier run")
    first, second = run_two("stuck", tmp_path)
    assert 76 in (first.returncode, second.returncode), first.stderr
    assert "all_reduce" in (tmp_path / "stuck" / "rank-0.txt").read_text()
    assert "all_reduce" in first.stderr
    assert (tmp_path / "stuck" / "rank-1.txt").exists()


def test_a_stopped_rank_is_killed_by_another(tmp_path: Path):
    """It cannot write its stacks."""
    first, second = run_two("stopped", tmp_path)
    assert (first.returncode, second.returncode) == (76, -signal.SIGKILL), first.stderr
    assert "Rank 1 (process " in first.stderr
    assert "all_reduce" in (tmp_path / "stuck" / "rank-0.txt").read_text()
    assert not (tmp_path / "stuck" / "rank-1.txt").exists()


@pytest.mark.parametrize("kind", ["slow", "saving"])
def test_work_of_one_rank_is_progress_of_all(tmp_path: Path, kind: str):
    ranks = run_two(kind, tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
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
    (done,) = run_forked(["-c", WORKER, *words])
    assert done.returncode == 76, done.stderr[-3000:]
    assert "stuck and ends" in done.stderr + done.stdout
    assert "dataloader.py" in (tmp_path / "stuck" / "rank-0.txt").read_text()


def test_heartbeats_say_who_a_rank_is(tmp_path: Path):
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


STOPPING = """
import os, signal, sys
from vlm.cli.train import main
from vlm.train.trainer import VLMTrainer

step = VLMTrainer.training_step


def training_step(self, *args, **kwargs):
    if self.state.global_step == 2 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, *args, **kwargs)


VLMTrainer.training_step = training_step
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_with_a_stopped_rank_ends(common: list[str], tmp_path: Path):
    """In the middle of training, with data workers, which end too."""
    words = [
        "-cn", "pretrain-smol", *common, "trainer.stuck_after=6", "trainer.dataloader_num_workers=1",
        "trainer.per_device_train_batch_size=2", f"trainer.output_dir={tmp_path}", "trainer.num_samples=0",
    ]  # fmt: skip
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    environments = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    first, second = run_forked(*[["-c", STOPPING, *words]] * 2, environments=environments)
    assert (first.returncode, second.returncode) == (76, -signal.SIGKILL), first.stderr
    assert "_inner_training_loop" in (tmp_path / "stuck" / "rank-0.txt").read_text()
    assert not (tmp_path / "final").exists()


ALONE = """
import sys, time
from pathlib import Path
from vlm.train.guards.watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 0.5, 1, 2)
watchdog.start()
for _ in range(10):
    watchdog.mark()
    time.sleep(0.1)
watchdog.stop()
"""


def test_stacks_that_an_earlier_run_left_end_no_rank(tmp_path: Path):
    """As on the disk of another node, where rank 0 removes nothing."""
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck" / "rank-0.txt").touch()
    (done,) = run_forked(["-c", ALONE, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "heartbeats").exists()
