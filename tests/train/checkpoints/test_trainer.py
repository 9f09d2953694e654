"""Checkpoints of real runs: whatever happens to one, the run goes on from one that is whole, or is refused."""

import errno
import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.fixtures import losses, newest_checkpoint
from tests.forked import run_forked
from tests.train.checkpoints.test_manifest import DAMAGES, flip_a_bit
from vlm.train.checkpoints import writer as writing
from vlm.train.checkpoints.files import UNFINISHED
from vlm.train.checkpoints.find import find_problems_together, find_whole_checkpoint
from vlm.train.checkpoints.manifest import MANIFEST, list_files, read_manifest
from vlm.train.checkpoints.writer import SaveError
from vlm.train.objectives.generation import Generation
from vlm.train.trainer import VLMTrainer

STEPS = ("trainer.max_steps=3", "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.num_samples=0",
         "trainer.report_to=none")  # fmt: skip
HANG = 300
"""Seconds after which a test that waits has failed."""
FILES = (
    "file_sizes.json", "guard.json", "loss_sums-0.json", "optimizer.pt", "rng_state.pth", "run.json", "scheduler.pt",
    "skipped-0.json", "trained.safetensors", "trainer_state.json", "world.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after each of its three steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return train("pretrain-smol", folder, *STEPS, "trainer.save_total_limit=3")


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def folders(run: Path) -> list[str]:
    """The folders of a run besides that of the first batch's images."""
    return sorted(path.name for path in run.iterdir() if path.is_dir() and path.name != "first_batch")


def test_a_manifest_has_every_file(trained: Path):
    assert folders(trained) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "final"]
    manifest = read_manifest(trained / "checkpoint-3")
    assert tuple(manifest.files) == FILES
    assert {*FILES, MANIFEST} == set(list_files(trained / "checkpoint-3"))
    assert (manifest.step, manifest.world_size) == (3, 1)
    assert not (trained / "final" / MANIFEST).exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_is_trained_on(trained: Path, tmp_path: Path, damage: str):
    for name in (*FILES, MANIFEST):
        run = tmp_path / name
        for checkpoint in ("checkpoint-2", "checkpoint-3"):
            shutil.copytree(trained / checkpoint, run / checkpoint)
        DAMAGES[damage](run / "checkpoint-3" / name)
        assert find_whole_checkpoint(run) == run / "checkpoint-2", name
        assert folders(run) == ["checkpoint-2", "checkpoint-3.damaged"]


def test_a_run_goes_on_from_the_one_before_to_the_same_weights(
    train: Callable[..., Path], copied: Path, caplog: pytest.LogCaptureFixture
):
    expected, weights = losses(copied), load_file(copied / "final" / "model.safetensors")
    flip_a_bit(copied / "checkpoint-3" / "optimizer.pt")
    shutil.rmtree(copied / "final")
    (copied / "checkpoint-best").mkdir()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the run was killed here
    train("pretrain-smol", copied, *STEPS, "trainer.resume_from_checkpoint=true", "trainer.save_total_limit=1")
    assert "checkpoint-3 is damaged: optimizer.pt has changed since it was written" in caplog.text
    assert folders(copied) == ["checkpoint-3", "checkpoint-3.damaged", "checkpoint-best", "final"]
    assert losses(copied) == expected
    again = load_file(copied / "final" / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_a_named_one_that_is_damaged_is_refused(train: Callable[..., Path], copied: Path, tmp_path: Path):
    flip_a_bit(copied / "checkpoint-2" / "trainer_state.json")
    words = f"trainer.resume_from_checkpoint={copied / 'checkpoint-2'}"
    with pytest.raises(
        ValueError, match=r"trainer_state\.json has changed since it was written.*Name another checkpoint"
    ):
        train("pretrain-smol", tmp_path / "other", *STEPS, words)
    assert (copied / "checkpoint-2").is_dir()


def test_an_older_one_that_is_resumed_sets_later_ones_aside(
    train: Callable[..., Path], copied: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed while a later one is written over, nothing of two histories is mixed."""
    monkeypatch.setattr(VLMTrainer, "_save_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("pretrain-smol", copied, *STEPS, f"trainer.resume_from_checkpoint={copied / 'checkpoint-1'}")
    assert folders(copied) == [
        "checkpoint-1", "checkpoint-2.superseded", "checkpoint-3.superseded", "final.superseded", UNFINISHED,
    ]  # fmt: skip
    assert newest_checkpoint(copied).name == "checkpoint-1"


def interrupted(self: VLMTrainer, folder: str) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_killed_in_its_first_save_blocks_nothing(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(VLMTrainer, "_save_rng_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("pretrain-smol", tmp_path / "run", *STEPS)
    assert folders(tmp_path / "run") == [UNFINISHED]
    unfinished = tmp_path / "run" / UNFINISHED / "checkpoint-1"
    assert list_files(unfinished) == ["optimizer.pt", "scheduler.pt", "trained.safetensors", "world.json"]
    train("pretrain-smol", tmp_path / "run", *STEPS)
    assert folders(tmp_path / "run") == ["checkpoint-2", "checkpoint-3", "final"]


def full_at(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 9) -> None:
    """Let the disk be full so many times when a folder of this name is to be written."""
    begin, tries = writing.FolderWriter.begin, Counter[str]()

    def begun(self: writing.FolderWriter, num_bytes: int) -> None:
        tries[self.target.name] += 1
        with monkeypatch.context() as patch:
            if self.target.name == name and tries[name] <= times:
                patch.setattr(writing, "free_bytes", lambda path: 1000)
            begin(self, num_bytes)

    monkeypatch.setattr(writing.FolderWriter, "begin", begun)


def test_a_full_disk_ends_the_run_with_what_there_is(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full_at(monkeypatch, "checkpoint-2")
    with pytest.raises(SaveError, match=r"run/checkpoint-2 could not be saved: the disk /\S* is full\.") as full:
        train("pretrain-smol", tmp_path / "run", *STEPS)
    assert "kB are needed and 1.0 kB are free. Free some space. Earlier checkpoints are unchanged" in str(full.value)
    assert folders(tmp_path / "run") == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_or_the_run_goes_on_and_tries_again(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    full_at(monkeypatch, "checkpoint-2")
    train("pretrain-smol", tmp_path / "run", *STEPS, "trainer.on_save_error=continue")
    assert "The run continues, because trainer.on_save_error=continue" in caplog.text
    assert folders(tmp_path / "run") == ["checkpoint-1", "checkpoint-3", "final"]


def test_final_is_whole_or_not_there(train: Callable[..., Path], copied: Path, monkeypatch: pytest.MonkeyPatch):
    before = (copied / "final" / "model.safetensors").read_bytes()
    full_at(monkeypatch, "final")
    words = ("trainer.max_steps=4", "trainer.on_save_error=continue")  # a longer run replaces the model of the first
    with pytest.raises(SaveError, match="final could not be saved"):
        train("pretrain-smol", copied, *STEPS, *words)
    assert (copied / "final" / "model.safetensors").read_bytes() == before
    assert not (copied / UNFINISHED).exists()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that evaluations give, one after the other."""
    values: list[float] = []
    monkeypatch.setattr(Generation, "evaluate", lambda self, trainer, dataset: {"loss": values.pop(0)})
    return values


EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=1", "dataset.eval_split=0.25", "trainer.max_steps=4",
             "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.num_samples=0",
             "trainer.report_to=none", "trainer.keep_best=eval_loss", "trainer.save_total_limit=1")  # fmt: skip


def test_the_best_model_is_kept_and_exported(train: Callable[..., Path], tmp_path: Path, measured: list[float]):
    """Saved when it is measured, between two checkpoints; and compared with after the run was resumed."""
    measured += [3.0, 2.0, 1.0, 2.5]
    run = train("pretrain-smol", tmp_path / "run", *EVALUATED)
    assert folders(run) == ["best", "checkpoint-3", "checkpoint-4", "final"]
    best = load_file(run / "best" / "model.safetensors")
    trained = load_file(run / "checkpoint-3" / "trained.safetensors")
    assert all(torch.equal(best[name], weight) for name, weight in trained.items())
    final = load_file(run / "final" / "model.safetensors")
    assert any(not torch.equal(best[name], weight) for name, weight in final.items())
    AutoModelForImageTextToText.from_pretrained(run / "best")
    for folder in ("best", "checkpoint-4"):
        told = json.loads((run / folder / "best.json").read_text())
        assert told == {"metric": "eval_loss", "value": 1.0, "step": 3}

    measured += [1.5]
    words = ("trainer.max_steps=5", "trainer.resume_from_checkpoint=true")
    train("pretrain-smol", run, *EVALUATED[:3], *EVALUATED[4:], *words)
    again = load_file(run / "best" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in best.items())
    assert "checkpoint-3" in folders(run)


def test_a_best_model_that_cannot_be_saved_is_not_the_best(
    train: Callable[..., Path], tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
):
    """The next one that is better than those before is."""
    measured += [1.0, 3.0, 2.0, 4.0]
    full_at(monkeypatch, "best", times=1)
    run = train("pretrain-smol", tmp_path / "run", *EVALUATED, "trainer.on_save_error=continue")
    assert folders(run) == ["best", "checkpoint-3", "checkpoint-4", "final"]
    assert json.loads((run / "checkpoint-4" / "best.json").read_text())["value"] == 2.0


KILLED = """
import os, signal, sys
run, number, count = sys.argv[1], int(sys.argv[2]), 0

def count_changes(event, given):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and str(given[0]).startswith(run):
        count += any(name in str(given[0]) for name in ("checkpoint-", "final", "unfinished"))
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count_changes)
from vlm.cli.train import main
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_a_kill_at_any_change_of_a_save_tears_nothing(common: list[str], tmp_path: Path):
    """Killed before its n-th change in the folders that it saves; what it has, it has whole, and goes on from."""
    kills = 0
    for number in range(1, 1000, 7):
        run = tmp_path / str(number)
        words = ["-cn", "pretrain-smol", *common, *STEPS, "trainer.save_total_limit=1", f"trainer.output_dir={run}"]
        (done,) = run_forked(["-c", KILLED, str(run), str(number), *words])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        kills += 1
        whole = [path for path in run.glob("checkpoint-*") if find_problems_together(path) == []]
        found = find_whole_checkpoint(run)
        assert found == max(whole, default=None)
        assert not list(run.glob("*.damaged"))
        if number % 5 == 0 and found != run / "checkpoint-3":
            resume = [f"trainer.resume_from_checkpoint={str(found is not None).lower()}"]
            (done,) = run_forked(["-c", KILLED, str(run), "-1", *words, *resume])
            assert done.returncode == 0, done.stderr[-3000:]
            assert folders(run) == ["checkpoint-3", "final"]
    assert kills >= 15


def test_a_checkpoint_is_written_while_the_run_goes_on(
    train: Callable[..., Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The writing of the first checkpoint waits for the second step, which a run that waited would never come to."""
    second_step, plain_step, save_hashed = threading.Event(), VLMTrainer.training_step, writing.save_hashed

    def write_late(*args: object, **kwargs: object) -> object:
        assert threading.current_thread() is not threading.main_thread()
        assert second_step.wait(HANG)
        return save_hashed(*args, **kwargs)

    def step(trainer: VLMTrainer, *args: object, **kwargs: object) -> object:
        if trainer.state.global_step == 1:
            assert not (tmp_path / "run" / "checkpoint-1").exists()
            second_step.set()
        return plain_step(trainer, *args, **kwargs)

    monkeypatch.setattr(writing, "save_hashed", write_late)
    monkeypatch.setattr(VLMTrainer, "training_step", step)
    run = train("pretrain-smol", tmp_path / "run", *STEPS, "trainer.save_total_limit=3", "trainer.async_save=true")
    assert folders(run) == folders(trained)
    assert losses(run) == losses(trained)
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        assert read_manifest(run / name).files.keys() == read_manifest(trained / name).files.keys()
        saved, expected = (load_file(folder / name / "trained.safetensors") for folder in (run, trained))
        assert all(torch.equal(saved[key], expected[key]) for key in expected)
        ours, theirs = (torch.load(folder / name / "optimizer.pt")["state"] for folder in (run, trained))
        assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in theirs)
    assert find_problems_together(run / "checkpoint-3") == []


def test_a_full_disk_in_the_background_ends_the_run_or_not_as_it_says(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fill(*args: object, **kwargs: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_hashed", fill)
    words = (*STEPS, "trainer.async_save=true")
    with pytest.raises(SaveError, match=r"disk .* is full"):
        train("pretrain-smol", tmp_path / "stopped", *words)
    assert folders(tmp_path / "stopped") == []
    run = train("pretrain-smol", tmp_path / "continued", *words, "trainer.on_save_error=continue")
    assert folders(run) == ["final"]
    assert caplog.text.count("The run continues, because trainer.on_save_error=continue") == 3
