"""What a run leaves behind of its course: lines, `run.log`, `status.json`, alerts, and what trackers get."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from tests.fixtures import check_config, compose_config
from vlm.checks.fields import ConfigError
from vlm.runs.read import RunDirectory
from vlm.train.guards.errors import GuardStop
from vlm.train.monitor import progress_line
from vlm.train.monitor.progress_line import ProgressLine
from vlm.train.monitor.recording import record_run, record_stuck
from vlm.train.monitor.run_log import IN_PLACE, RunLog
from vlm.train.monitor.status import RunStatus

TELL = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(json.load(sys.stdin)) + '\\n')"


def read_status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@contextmanager
def fake_trackio() -> Iterator[list[dict[str, float]]]:
    """A tracker of that name that keeps what it is told."""
    told: list[dict[str, float]] = []
    module: Any = ModuleType("trackio")
    module.__spec__, module.__version__ = ModuleSpec("trackio", None), "0.0"
    module.init = lambda **options: told.append({"name": options["name"]})
    module.log = lambda values, **options: told.append(values)
    module.finish = lambda: None
    module.Markdown = lambda text: text
    module.Image = lambda image, caption: (image.size, caption)
    module.config = {}
    module.config = type("Config", (dict,), {"update": lambda self, values, **options: None})()
    module.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trackio", module)
        yield told


@pytest.fixture(scope="module")
def watched(
    train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, world: Path
) -> tuple[Path, list[Any], list[Any], list[str]]:
    """A run that is shorter than two logs, the events that its alert command got, what its tracker got, its lines."""
    folder, records = tmp_path_factory.mktemp("watched"), world / "records.json"
    told, words = folder / "told.jsonl", [sys.executable, "-S", "-c", TELL]
    shown: list[str] = []
    with fake_trackio() as tracked, pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_line.log, "info", lambda form, *values, **options: shown.append(form % values))
        script = folder / "tell.sh"
        script.write_text(f'#!/bin/sh\nexec {words[0]} -S -c "{TELL}" {told}\n')
        script.chmod(0o755)
        run = train(
            "pretrain-smol", folder / "run", "trainer.max_steps=3", "trainer.logging_steps=2",
            "trainer.report_to=[trackio]", "trainer.trackio_static_space_id=false", f"trainer.alert_command=[{script}]",
            f"dataset.eval_path={records}", "trainer.eval_strategy=steps", "trainer.eval_steps=3",
        )  # fmt: skip
    return run, [json.loads(line) for line in told.read_text().splitlines()], tracked, shown


def test_the_last_step_is_logged_and_has_the_norms_of_parts(watched: Any):
    lines = [json.loads(line) for line in (watched[0] / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [2, 3]
    for line in logged:
        assert line["grad_norm/connector"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert 0 < logged[0]["update_norm/connector"] < 1


def test_the_status_says_that_the_run_is_done(watched: Any):
    status = read_status(watched[0])
    assert (status["state"], status["step"], status["max_steps"], status["seconds_left"]) == ("done", 3, 3, 0)
    assert status["loss"] > 0
    assert status["learning_rates"].keys() == {"connector"}
    assert status["started_at"] <= status["updated_at"] <= time.time()
    assert status["memory_bytes"] > 1e6
    assert not list(watched[0].glob(".*partial"))


def test_lines_stand_for_logs_and_evaluations(watched: Any):
    starts = [line.split("  ")[0] for line in watched[3]]
    assert starts == ["step 2/3", "step 3/3", "evaluation at step 3:"]
    assert "image gain" in watched[3][-1]


def test_the_alert_tells_that_the_run_is_done(watched: Any):
    (event,) = watched[1]
    assert (event["event"], event["run"], event["step"]) == ("done", str(watched[0]), 3)


def test_a_tracker_gets_our_keys_under_the_name_of_the_run(watched: Any):
    first, *logs = watched[2]
    assert first == {"name": "run"}
    keys = {key for values in logs for key in values}
    assert {"train/loss", "train/grad_norm/connector", "train/update_norm/connector", "eval/loss"} <= keys


def test_a_tracker_gets_the_answers_to_samples_with_their_images(watched: Any):
    (sent,) = [values for values in watched[2] if "samples/0" in values]
    assert sent["train/global_step"] == 3
    assert "**question**\n\n    what is in this picture?\n\n**reference**" in sent["samples/0"]
    size, caption = sent["samples/0/image"]
    assert max(size) <= 224
    assert caption == "what is in this picture?"


def test_the_log_of_a_run_is_in_its_directory(watched: Any):
    assert (watched[0] / "run.log").exists() or not logging.getLogger("vlm").isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("name", "extra"), [("mlflow", "mlflow"), ("trackio", "trackio"), ("wandb", "track")])
def test_a_tracker_that_is_missing_is_refused_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, world: Path, name: str, extra: str
):
    monkeypatch.setattr("vlm.checks.trackers.find_spec", lambda module: None)
    config = compose_config("pretrain-smol", [f"dataset.path={world / 'records.json'}", f"trainer.report_to=[{name}]"])
    expected = rf"trainer.report_to={name}: {name} is not installed. pip install 'small-vlm\[{extra}\]'"
    with pytest.raises(ConfigError, match=expected):
        check_config(config)


@pytest.mark.parametrize(
    ("error", "state", "event", "message"),
    [
        (SystemExit(75), "stopped", "stopped", "A signal stopped it after a checkpoint; the same command resumes it"),
        (ValueError("bad\nvalue"), "refused", "refused", "bad"),
        (RuntimeError("out of memory"), "failed", "failed", "out of memory"),
        (GuardStop("the loss is NaN"), "failed", "diverged", "the loss is NaN"),
        (KeyboardInterrupt(), "stopped", "stopped", "KeyboardInterrupt"),
        (SystemExit(1), "failed", "failed", "exit code 1"),
    ],
)  # fmt: skip
def test_the_end_of_a_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str, event: str, message: str
):
    sent: list[Any] = []
    monkeypatch.setattr("vlm.train.monitor.recording.send_alert", lambda command, event: sent.append((command, event)))

    def fail() -> None:
        with RunLog(rank=0) as log, record_run(tmp_path, log, ["tell"], is_writer=True):
            assert read_status(tmp_path)["state"] == "starting"
            raise error

    with pytest.raises(type(error)):
        fail()
    status = read_status(tmp_path)
    assert (status["state"], status["message"]) == (state, message)
    ((command, told),) = sent
    assert (command, told["event"], told["message"]) == (["tell"], event, message)


def test_a_run_that_has_begun_to_train_is_not_refused(tmp_path: Path):
    def fail() -> None:
        with RunLog(rank=0) as log, record_run(tmp_path, log, (), is_writer=True) as status:
            status.update(state="training", step=0, max_steps=3)
            raise ValueError("a record cannot be used")

    with pytest.raises(ValueError, match="a record"):
        fail()
    assert read_status(tmp_path)["state"] == "failed"


def test_a_stuck_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: list[Any] = []
    monkeypatch.setattr("vlm.train.monitor.recording.send_alert", lambda command, event: sent.append(event["event"]))
    record_stuck(RunStatus(tmp_path), ["tell"], "nothing was done")
    assert sent == ["stuck"]
    assert read_status(tmp_path)["message"] == "nothing was done"


def test_a_state_ends_with_what_it_is_of(tmp_path: Path):
    status = RunStatus(tmp_path)
    status.update(state="training")
    with status.during("evaluating"):
        assert read_status(tmp_path)["state"] == "evaluating"
    assert read_status(tmp_path)["state"] == "training"
    status.renew(step=7)
    assert read_status(tmp_path)["step"] is None, "it is too young to be renewed"
    assert status.values["step"] == 7


def test_a_resumed_run_keeps_the_duration_of_its_earlier_starts(tmp_path: Path):
    for _ in range(3):
        status = RunStatus(tmp_path, is_resumed=True)
        status.values["started_at"] = time.time() - 60
        status.update(state="stopped")
    assert RunDirectory(tmp_path).seconds == pytest.approx(180, abs=2)
    RunStatus(tmp_path).update(state="training")
    assert RunDirectory(tmp_path).seconds == pytest.approx(0, abs=2)
    (tmp_path / "status.json").write_text("{damaged")
    assert RunStatus(tmp_path, is_resumed=True).values["earlier_seconds"] == 0


def test_a_disk_that_is_away_does_not_end_a_run(tmp_path: Path):
    RunStatus(tmp_path / "missing").update(state="training")


def test_a_terminal_has_one_line_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path):
    monkeypatch.setattr(progress_line, "shows_bars", lambda: True)
    line = ProgressLine(RunStatus(tmp_path), is_writer=True)
    args: Any = SimpleNamespace(disable_tqdm=False, logging_strategy="steps")
    state: Any = SimpleNamespace(global_step=0, max_steps=3, epoch=0.0)
    control = TrainerControl()
    line.on_train_begin(args, state, control)
    for step in (1, 2, 3):
        state.global_step = step
        print(f"a word at step {step}")
        line.on_step_end(args, state, control)
        line.on_log(args, state, control, {"loss": 3.0 / step, "learning_rate/connector": 1e-3})
    assert control.should_log, "of the last step"
    line.on_train_end(args, state, control)
    printed, drawn = capsys.readouterr()
    assert printed == "".join(f"a word at step {step}\n" for step in (1, 2, 3))
    assert drawn.count("\n") == 1, "the last state stays"
    assert "loss 1.5" in drawn
    assert drawn.rsplit("\r", 1)[1].startswith("step 3/3")


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, [1, 4, 6]), (False, [1, 2, 3, 4, 5, 6])])
def test_of_evaluations_in_quick_succession_a_terminal_shows_some(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    is_terminal: bool,
    shown: list[int],
):
    """Four seconds apart; `run.log` and the history have all."""
    monkeypatch.setattr(progress_line, "shows_bars", lambda: is_terminal)
    seconds = iter(range(0, 1000, 4))
    line = ProgressLine(RunStatus(tmp_path), is_writer=True)
    args: Any = SimpleNamespace(disable_tqdm=False, logging_strategy="steps")
    state: Any = SimpleNamespace(global_step=0, max_steps=6, epoch=0.0)
    line.on_train_begin(args, state, TrainerControl())
    monkeypatch.setattr(progress_line, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    with caplog.at_level("INFO"):
        for step in range(1, 7):
            state.global_step = step
            line.on_log(args, state, TrainerControl(), {"eval_loss": 1.0 / step})
    line.on_train_end(args, state, TrainerControl())
    lines = [record for record in caplog.records if record.getMessage().startswith("evaluation at step")]
    assert len(lines) == 6
    assert [number for number, record in enumerate(lines, start=1) if not getattr(record, IN_PLACE)] == shown
