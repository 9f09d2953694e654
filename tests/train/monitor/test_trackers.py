"""What trackers get besides metrics: the settings of a run, the answers to samples, and its end."""

import signal
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from vlm.clusters.processes import SAVED_EXIT_CODE
from vlm.train.guards.errors import GuardStop
from vlm.train.monitor.plots import AnsweredSample
from vlm.train.monitor.trackers import SampleSender, SettingsSender, add_trackers, as_markdown, tracked_run

IMAGE = Image.new("L", (600, 300))
SAMPLES = [
    AnsweredSample("\nwhat?", "a `cat`", "a dog\n# no heading", IMAGE),
    AnsweredSample("why?", "so", "*", IMAGE, IMAGE),
]
WRITER: Any = SimpleNamespace(is_world_process_zero=True)


class Calls(ModuleType):
    """A library that notes what is called of it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        self.config = SimpleNamespace(update=self.note("config.update"))

    def note(self, name: str) -> Any:
        return lambda *given, **named: self.calls.append((name, *given, named)) or (name, *given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.note(name)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def make_trainer(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[TrainerCallback]) -> tuple[Any, Calls]:
    """A trainer with a tracker and another callback, and the tracker's library."""
    library = Calls(name)
    monkeypatch.setitem(sys.modules, name, library)
    callback: Any = object.__new__(kind)
    callback._auto_end_run = False  # read where MLflow's is deleted
    trainer: Any = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[callback, TrainerCallback()]))
    add_trackers(trainer, {"trainer.seed": 1, "dataset.path": "a.json"} | {f"key.{at}": at for at in range(150)})
    return trainer, library


def test_trackers_come_last_and_get_the_settings_when_they_have_begun(monkeypatch: pytest.MonkeyPatch):
    trainer, wandb = make_trainer(monkeypatch, "wandb", WandbCallback)
    callbacks = trainer.callback_handler.callbacks
    assert [type(one) for one in callbacks] == [TrainerCallback, WandbCallback, SettingsSender]
    callbacks[-1].on_train_begin(None, WRITER, None)
    ((settings, _),) = wandb.of("config.update")
    assert settings["trainer.seed"] == 1


def test_wandb_gets_a_table_and_images_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch):
    trainer, wandb = make_trainer(monkeypatch, "wandb", WandbCallback)
    send = SampleSender(trainer)
    send(5, SAMPLES)
    send(9, SAMPLES)
    first, second = [sent for sent, _ in wandb.of("log")]
    assert first["train/global_step"] == 5
    assert first["samples"][2] == [[0, "what?", "a `cat`", "a dog\n# no heading"], [1, "why?", "so", "*"]]
    assert (first["samples/0"][1].size, first["samples/1"][1].size) == ((224, 112), (600, 300))
    assert "samples/0" not in second, "it is the same image"
    assert "samples/1" in second, "it has other objects on it"
    with tracked_run(trainer.callback_handler, is_writer=True):
        pass
    with pytest.raises(KeyError), tracked_run(trainer.callback_handler, is_writer=True):
        raise KeyError
    with tracked_run(trainer.callback_handler, is_writer=False):
        pass
    assert [named["exit_code"] for (named,) in wandb.of("finish")] == [0, 1]


def test_mlflow_gets_parameters_in_parts_and_artifacts(monkeypatch: pytest.MonkeyPatch):
    trainer, mlflow = make_trainer(monkeypatch, "mlflow", MLflowCallback)
    trainer.callback_handler.callbacks[-1].on_train_begin(None, WRITER, None)
    assert [len(values) for values, _ in mlflow.of("log_params")] == [100, 52]
    SampleSender(trainer)(5, SAMPLES)
    ((text, file, _),) = mlflow.of("log_text")
    assert file == "samples/step-0000005.md"
    assert "## Sample 1\n\n**question**\n\n    why?" in text
    assert [name for _, name, _ in mlflow.of("log_image")] == ["samples/0.png", "samples/step-0000005-1.png"]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyError(), "FAILED"),
        (SystemExit(SAVED_EXIT_CODE), "KILLED"),
        (SystemExit(128 + signal.SIGTERM), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (GuardStop("the loss is NaN"), "FAILED"),
    ],
)
def test_mlflow_is_told_how_a_run_ended(monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str):
    trainer, mlflow = make_trainer(monkeypatch, "mlflow", MLflowCallback)
    with pytest.raises(type(error)), tracked_run(trainer.callback_handler, is_writer=True):
        raise error
    with tracked_run(trainer.callback_handler, is_writer=True):
        pass
    assert mlflow.of("end_run") == [(state, {}), ("FINISHED", {})]


def test_texts_are_shown_as_they_are():
    shown = as_markdown(SAMPLES[0])
    assert shown.endswith("**answer**\n\n    a dog\n    # no heading")
    assert "    a `cat`" in shown
