"""Two ranks under ZeRO-3, launched again and again: each ends with exit code 0, however late its threads run."""

from pathlib import Path

import pytest

from tests.torture.runs import LANGUAGE_MODEL, check_ended, train

IDLE_THREADS = """
import os
import runpy
import threading
import time


def make_idle():
    while True:
        for task in os.listdir("/proc/self/task"):
            try:
                if open(f"/proc/self/task/{task}/comm").read().startswith(("gloo", "pt_gloo")):
                    os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
            except OSError:
                pass  # it has ended
        time.sleep(0.05)


threading.Thread(target=make_idle, daemon=True).start()
runpy.run_module("vlm", run_name="__main__", alter_sys=True)
"""
"""Trains as `python -m vlm` does, with the threads of gloo at idle priority."""


@pytest.mark.parametrize("launches", [1, pytest.param(99, marks=pytest.mark.torture)])
def test_ranks_end_cleanly(common: list[str], tmp_path: Path, launches: int):
    words = [
        "-cn", "finetune-smol", *common, LANGUAGE_MODEL, "trainer.deepspeed=zero3", "trainer.packing=true",
        "trainer.max_steps=2", "trainer.save_strategy=no",
    ]  # fmt: skip
    for number in range(launches):
        ended = train([*words, f"trainer.output_dir={tmp_path / str(number)}"], 2, IDLE_THREADS)
        check_ended(ended)
        assert not any("terminate called" in process.stderr for process in ended)
