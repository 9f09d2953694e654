"""What a process does on a signal, by where its run is. Each is one of its own, which imports no torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import HANG, restore_signals, wait_until

BEGIN = """
import logging, os, signal, sys, time
from pathlib import Path
from vlm.train import signals
from vlm.train.signals import Phase, SignalListener
logging.basicConfig(level=logging.INFO)
signals.SAME_REQUEST_SECONDS = 0.2
listener = SignalListener(Phase[os.environ["PHASE"]])
listener.__enter__()
def begun():
    Path("begun").touch()
"""
STEPS = """
begun()
while listener.received is None:
    time.sleep(0.01)
sys.exit(75)
"""
STUCK = "begun()\nos.read(os.pipe()[0], 1)  # as in a collective whose other ranks are gone\n"


def start(folder: Path, code: str, phase: str = "TRAINING", *before: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [*before, sys.executable, "-c", BEGIN + code], cwd=folder, env={**os.environ, "PHASE": phase},
        stderr=subprocess.PIPE, text=True, preexec_fn=restore_signals,
    )  # fmt: skip
    wait_until(lambda: (folder / "begun").exists(), process)
    return process


def wait_for_another_request() -> None:
    """Let more than `SAME_REQUEST_SECONDS` pass."""
    time.sleep(0.5)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Return the exit status and what was said."""
    assert process.stderr is not None
    with process.stderr:
        return process.wait(HANG), process.stderr.read()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_the_first_signal_is_left_to_the_trainer(tmp_path: Path, name: str):
    process = start(tmp_path, STEPS)
    process.send_signal(signal.Signals[name])
    status, said = end(process)
    assert status == 75
    assert f"Received {name}: the run ends after this step, with a checkpoint" in said


def test_before_the_first_step_a_run_ends_at_once(tmp_path: Path):
    process = start(tmp_path, STUCK, "START")
    process.terminate()
    status, said = end(process)
    assert status == 75
    assert "The same command starts it again" in said


def test_after_the_last_step_a_run_goes_on_to_its_end(tmp_path: Path):
    code = "begun()\nwhile listener.received is None: time.sleep(0.01)\nprint('final', file=sys.stderr)\n"
    process = start(tmp_path, code, "END")
    process.terminate()
    status, said = end(process)
    assert status == 0
    assert "once the finished model is written" in said
    assert "final" in said


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_that_is_stuck(tmp_path: Path, second: signal.Signals, status: int):
    """The main thread waits in a system call and runs no Python."""
    process = start(tmp_path, STUCK)
    process.terminate()
    wait_for_another_request()
    process.send_signal(second)
    code, said = end(process)
    assert code == status
    assert "again: the run ends at once, without saving" in said


def test_signals_at_the_same_time_are_one_request(tmp_path: Path):
    """As where a launcher passes on what the terminal has sent to all processes already."""
    code = "signals.SAME_REQUEST_SECONDS = 60\nbegun()\nwhile not Path('go').exists(): time.sleep(0.01)\nsys.exit(75)\n"
    process = start(tmp_path, code)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    (tmp_path / "go").touch()
    assert end(process)[0] == 75


def test_a_second_signal_waits_for_a_checkpoint(tmp_path: Path):
    code = """
with listener.saving():
    begun()
    while not Path("go").exists():
        time.sleep(0.01)
    Path("written").touch()
sys.exit(75)
"""
    process = start(tmp_path, code)
    process.terminate()
    wait_for_another_request()
    process.terminate()
    (tmp_path / "go").touch()
    status, said = end(process)
    assert status == 75
    assert (tmp_path / "written").exists()
    assert "as soon as the checkpoint is written" in said or "as soon as the current write is complete" in said


def test_forks_do_not_hear_for_their_parent(tmp_path: Path):
    """`multiprocessing` ends its workers by SIGTERM."""
    code = """
fork = os.fork()
if fork == 0:
    time.sleep(900)
os.kill(fork, signal.SIGUSR1)
os.kill(fork, signal.SIGTERM)
_, status = os.waitpid(fork, 0)
time.sleep(0.2)
begun()
sys.exit(0 if listener.received is None and os.WTERMSIG(status) == signal.SIGTERM else 1)
"""
    assert end(start(tmp_path, code))[0] == 0


def test_nohup_is_respected(tmp_path: Path):
    code = "begun()\nwhile not Path('go').exists(): time.sleep(0.01)\nsys.exit(int(listener.received is not None))\n"
    process = start(tmp_path, code, "TRAINING", "nohup")
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert end(process)[0] == 0


def test_a_rank_notices_that_its_launcher_has_gone(tmp_path: Path):
    """Its parent stays: the launcher above is killed, as `deepspeed` is above the process that starts its ranks."""
    (tmp_path / "rank.py").write_text(BEGIN + STEPS.replace("sys.exit(75)", "Path('saved').touch()"))
    for name, child in {"torchrun": "rank.py", "deepspeed": "torchrun"}.items():
        code = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / child)!r}])"
        (tmp_path / name).write_text(code)
    launcher = subprocess.Popen(
        [sys.executable, tmp_path / "deepspeed"], cwd=tmp_path, env={**os.environ, "PHASE": "TRAINING"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "begun").exists(), launcher)
    launcher.kill()
    wait_until(lambda: (tmp_path / "saved").exists())
    assert "The process that launched this run has ended" in end(launcher)[1]


def test_handlers_are_restored(tmp_path: Path):
    code = "before = signal.getsignal(signal.SIGINT)\nlistener.__exit__()\nbegun()\n"
    code += "sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)\n"
    assert end(start(tmp_path, code))[0] == 0


def test_a_second_signal_interrupts_a_notebook_and_leaves_it_alive(tmp_path: Path):
    code = """
listener.owns_process = False
try:
    begun()
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    sys.exit(7)
"""
    process = start(tmp_path, code)
    process.send_signal(signal.SIGINT)
    wait_for_another_request()
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 7
