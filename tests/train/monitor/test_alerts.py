"""A command of the user's own is told of an event, within its time, and never harms the run."""

import json
import logging
import sys
import time
from pathlib import Path

import pytest

from vlm.train.monitor.alerts import send_alert

EVENT = {"event": "failed", "run": "outputs/a b", "step": 7, "message": "memory ran out; $(touch x)", "loss": None}
TELL = "import json, os, sys; json.dump([json.load(sys.stdin), dict(os.environ)], open(sys.argv[1], 'w'))"


def test_the_command_gets_the_event_twice_and_no_shell_reads_it(tmp_path: Path):
    told = tmp_path / "told; touch x.json"
    assert send_alert([sys.executable, "-S", "-c", TELL, str(told)], EVENT)
    event, environment = json.loads(told.read_text())
    assert event == EVENT
    assert environment["VLM_EVENT"] == "failed"
    assert environment["VLM_STEP"] == "7"
    assert environment["VLM_MESSAGE"] == EVENT["message"]
    assert "VLM_LOSS" not in environment
    assert list(tmp_path.iterdir()) == [told]


def test_what_takes_too_long_is_killed_with_what_it_started(caplog: pytest.LogCaptureFixture):
    start = time.perf_counter()
    assert not send_alert(["sh", "-c", "sleep 60 & echo waiting; sleep 60"], EVENT, seconds=0.3)
    assert time.perf_counter() - start < 20
    assert "took longer than 0.3 s and was killed; waiting" in caplog.text


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["no-such-program"], "No such file"), (["sh", "-c", "echo no network >&2; exit 3"], "exit code 3; no network"),
        (["a\0b"], "null"),
    ],
)  # fmt: skip
def test_what_fails_is_a_warning(caplog: pytest.LogCaptureFixture, command: list[str], reason: str):
    with caplog.at_level(logging.WARNING):
        assert not send_alert(command, EVENT)
    assert reason in caplog.text
    assert "the run is not affected" in caplog.text


def test_without_a_command_nothing_is_run():
    assert not send_alert([], EVENT)
