"""Data workers that die end the run with what to do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from tests.fixtures import compose_config
from vlm.data import dataset
from vlm.train.guards.errors import DataWorkerDied, GuardStop, describe_worker_death, explain_worker_death


def test_a_worker_that_is_killed_ends_the_run(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the system does where memory runs out."""
    encode, numbers = dataset.encode_sample, iter(range(10**6))

    def killed(source: Any, sample: Any) -> Any:
        if get_worker_info() is not None and next(numbers) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(source, sample)

    monkeypatch.setattr(dataset, "encode_sample", killed)
    with pytest.raises(DataWorkerDied, match=r"memory ran out .*trainer.dataloader_num_workers \(now 2\)"):
        train("pretrain-smol", tmp_path, "trainer.dataloader_num_workers=2", "trainer.per_device_train_batch_size=2",
              "trainer.num_samples=0")  # fmt: skip


def test_what_is_said_depends_on_what_it_died_of():
    config = compose_config("pretrain-smol", ["dataset.path=x", "dataset.streaming=true"])
    killed = describe_worker_death("DataLoader worker (pid 7) is killed by signal: Killed. ", config)
    assert "process 7" in killed
    assert "dataset.shuffle_buffer (now 1,000 records per worker)" in killed
    assert "/dev/shm" in describe_worker_death("is killed by signal: Bus error. out of shared memory", config)
    assert "dataloader_num_workers=0" in describe_worker_death("is killed by signal: Segmentation fault.", config)


def test_other_errors_stay_as_they_are():
    config = compose_config("pretrain-smol", ["dataset.path=x"])
    with pytest.raises(RuntimeError, match=r"^other$"), explain_worker_death(config):
        raise RuntimeError("other")


def test_a_guard_ends_the_process_with_its_code():
    stop = GuardStop("what happened")
    assert (stop.code, str(stop)) == (76, "what happened")
