"""Running several processes to their end: exit codes, signals, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.waiting import HANG, restore_signals, wait_until
from vlm.clusters.processes import descendants, find_launchers, is_launcher, parent_of

DRIVER = """
import os, sys
from vlm.clusters import processes
from vlm.clusters.processes import ProcessGroup
processes.SAME_REQUEST_SECONDS = 0.2
code, folder, grace, number = sys.argv[1:]
environments = [{**os.environ, "NUMBER": str(index), "FOLDER": folder} for index in range(int(number))]
sys.exit(ProcessGroup(float(grace)).run([sys.executable, "-c", code], environments))
"""
BEGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
number, folder = os.environ["NUMBER"], Path(os.environ["FOLDER"])
def begun():
    (folder / f"pid{number}.new").write_text(str(os.getpid()))
    (folder / f"pid{number}.new").rename(folder / f"pid{number}")
"""
SLEEP = "time.sleep(900)\n"
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
CATCH = """
def caught(signum, frame):
    (folder / f"got{number}").write_text(str(signum))
    sys.exit(75)
for name in ("TERM", "INT", "HUP", "USR1", "USR2"):
    signal.signal(getattr(signal, f"SIG{name}"), caught)
"""


def start(folder: Path, code: str, *, number: int = 2, grace: float = 30) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", DRIVER, BEGIN + code, str(folder), str(grace), str(number)]
    return subprocess.Popen(words, preexec_fn=restore_signals)


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("pid?")]


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(76 if number == '1' else 0)", 76),
        ("os.kill(os.getpid(), signal.SIGKILL) if number == '1' else time.sleep(900)", 137),
        ("sys.exit(3) if number == '0' else time.sleep(900)", 3),
        # A guard has killed a rank that was frozen.
        (
            f"{IGNORE}begun()\nwhile len([*folder.glob('pid?')]) < 2: time.sleep(0.01)\n"
            "os.kill(os.getpid(), signal.SIGKILL) if number == '1' else time.sleep(0.3)\nsys.exit(76)",
            76,
        ),
    ],
)
def test_the_exit_code_is_that_of_the_first_that_failed(tmp_path: Path, code: str, status: int):
    assert start(tmp_path, code).wait(HANG) == status


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
def test_signals_reach_all(tmp_path: Path, name: str):
    number = getattr(signal, f"SIG{name}")
    group = start(tmp_path, CATCH + "begun()\n" + SLEEP)
    wait_until(lambda: len(pids(tmp_path)) == 2, group)
    group.send_signal(number)
    assert group.wait(HANG) == 75
    assert [int(file.read_text()) for file in tmp_path.glob("got?")] == [number] * 2


def test_a_signal_before_ranks_listen_to_it_ends_a_run_that_can_be_resumed(tmp_path: Path):
    group = start(tmp_path, "begun()\n" + SLEEP)
    wait_until(lambda: len(pids(tmp_path)) == 2, group)
    group.terminate()
    assert group.wait(HANG) == 75


@pytest.mark.parametrize(("number", "status"), [(2, 75), (3, 137)])
def test_a_second_signal_waits_for_what_is_written_and_a_third_does_not(tmp_path: Path, number: int, status: int):
    code = "signal.signal(signal.SIGTERM, lambda *_: None)\nbegun()\n"
    code += "while not (folder / 'written').exists(): time.sleep(0.01)\nsys.exit(75)\n"
    group = start(tmp_path, code, grace=0.2)
    wait_until(lambda: len(pids(tmp_path)) == 2, group)
    for _ in range(number):
        group.terminate()
        time.sleep(0.5)
    (tmp_path / "written").touch()
    assert group.wait(HANG) == status


def test_what_does_not_end_is_killed(tmp_path: Path):
    code = IGNORE + "begun()\nwhile number == '1' and not (folder / 'pid0').exists(): time.sleep(0.01)\n"
    group = start(tmp_path, code + "sys.exit(5) if number == '1' else time.sleep(900)", grace=0.2)
    assert group.wait(HANG) == 5
    assert not any(map(is_alive, pids(tmp_path)))


def test_nothing_of_a_killed_process_is_left(tmp_path: Path):
    """As compilers are, where DeepSpeed's first compilation is killed."""
    compiler = (
        "subprocess.Popen([sys.executable, '-c', BEGIN + 'begun();' + SLEEP], env={**os.environ, 'NUMBER': 'x'})\n"
    )
    code = f"BEGIN, SLEEP = {BEGIN!r}, {SLEEP!r}\nbegun()\n{compiler}{SLEEP}"
    group = start(tmp_path, code, number=1)
    wait_until(lambda: len(pids(tmp_path)) == 2, group)
    os.kill(int((tmp_path / "pid0").read_text()), signal.SIGKILL)
    assert group.wait(HANG) == 137
    assert not any(map(is_alive, pids(tmp_path)))


def test_nothing_outlives_a_killed_launcher(tmp_path: Path):
    group = start(tmp_path, "begun()\n" + SLEEP)
    wait_until(lambda: len(pids(tmp_path)) == 2, group)
    group.kill()
    assert group.wait(HANG) == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, pids(tmp_path))))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /venv/bin/deepspeed --module vlm", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x", True),
        ("python /venv/bin/torchrun --nproc-per-node 2 -m vlm", True),
        ("python -m torch.distributed.run -m vlm", True),
        ("python /venv/bin/vlm launch --nproc 2 -- -cn x", True),
        ("python -u -m vlm launch -- -cn x", True),
        ("python -m vlm.demo", True),
        ("bash -c torchrun_all", False),
        ("-bash", False),
        ("python -m vlm -cn x", False),
        ("slurmstepd: [1.0]", False),
    ],
)
def test_launchers_are_known_by_their_command(command: str, expected: bool):
    assert is_launcher(command.split()) is expected


def test_processes_know_their_parents():
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants()
        assert parent_of(child.pid) == os.getpid()
    assert parent_of(child.pid) == 0
    assert find_launchers() == []
