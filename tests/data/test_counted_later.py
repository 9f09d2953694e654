"""Training begins while records are counted, and is what it is when they are counted first."""

import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from tests.fixtures import compose_config
from tests.waiting import wait_until
from vlm.data.batching.step_layout import SampleCosts
from vlm.data.counted_later import COUNTS, CountedLater, when_counted
from vlm.data.dataset import SampleDataset
from vlm.train import data as train_data
from vlm.train.data import needs_counts
from vlm.train.finish_counting import FinishCounting, counting
from vlm.train.step.step_packing import MeasuredSizes

RANDOM = ["dataset.over_length=error", "trainer.train_sampling_strategy=random", "trainer.num_train_epochs=2"]
PACKED = [*RANDOM, "trainer.packing=true", "trainer.max_tokens_per_batch=64"]

Train = Callable[..., Path]


@pytest.fixture
def counted_later(monkeypatch: pytest.MonkeyPatch) -> list[CountedLater]:
    """The data sets that are counted later; few records are many."""
    made: list[CountedLater] = []

    class Remembered(CountedLater):
        """A data set that is counted later, and remembered."""

        def __init__(self, *given: Any):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(train_data, "MANY_RECORDS", 1)
    monkeypatch.setattr(train_data, "NUM_CHECKED_FIRST", 2)
    monkeypatch.setattr(train_data, "CountedLater", Remembered)
    return made


def trained(folder: Path) -> tuple[object, ...]:
    """What a run logged of its steps, `data.json`, the data of its finished model's record, and its weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"], line["grad_norm"], line["epoch"]) for line in lines if "loss" in line]
    weights = {name: tensor.tolist() for name, tensor in load_file(folder / "final" / "model.safetensors").items()}
    data = json.loads((folder / "data.json").read_text())
    return losses, data, json.loads((folder / "final" / "run.json").read_text())["data"], weights


def test_a_run_that_begins_early_is_the_one_that_counts_first(
    train: Train, tmp_path: Path, counted_later: list[CountedLater], monkeypatch: pytest.MonkeyPatch
):
    """Its packed steps are laid out by lengths that are measured as they are needed."""
    early = train("pretrain-smol", tmp_path / "early", *PACKED, f"dataset.cache_dir={tmp_path / 'cache'}")
    assert len(counted_later) == 1
    monkeypatch.setattr(train_data, "MANY_RECORDS", 1_000)
    first = train("pretrain-smol", tmp_path / "first", *PACKED, f"dataset.cache_dir={tmp_path / 'other'}")
    again = train("pretrain-smol", tmp_path / "again", *PACKED, f"dataset.cache_dir={tmp_path / 'cache'}")
    assert trained(early) == trained(first) == trained(again)
    assert len(counted_later) == 1, "what is counted is not counted later"


@pytest.mark.parametrize("packing", [True, False])
def test_a_grouped_run_that_begins_early_is_the_one_that_counts_first(
    train: Train, tmp_path: Path, counted_later: list[CountedLater], monkeypatch: pytest.MonkeyPatch, packing: bool
):
    """Its steps are of one modality each, which the records list; lengths divide them as steps come."""
    words = [*RANDOM, *(PACKED[-2:] if packing else ()), "trainer.train_sampling_strategy=group_by_modality_length"]
    words += ["trainer.gradient_accumulation_steps=2"]
    early = train("pretrain-smol", tmp_path / "early", *words, f"dataset.cache_dir={tmp_path / 'cache'}")
    assert len(counted_later) == 1
    monkeypatch.setattr(train_data, "MANY_RECORDS", 1_000)
    first = train("pretrain-smol", tmp_path / "first", *words, f"dataset.cache_dir={tmp_path / 'other'}")
    assert trained(early) == trained(first)


def test_a_record_that_cannot_be_used_ends_the_run(
    train: Train, world: Path, tmp_path: Path, counted_later: list[CountedLater]
):
    records = json.loads((world / "records.json").read_text())
    records[-1]["conversations"] = []
    (tmp_path / "records.json").write_text(json.dumps(records))
    words = [f"dataset.path={tmp_path / 'records.json'}", f"dataset.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match="`conversations` must be a list of at least one turn"):
        train("pretrain-smol", tmp_path / "run", *RANDOM, *words)
    assert not counted_later[0]._process.is_alive()
    records[0]["conversations"] = []
    (tmp_path / "records.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="`conversations` must be a list"):
        train("pretrain-smol", tmp_path / "other", *RANDOM, *words)
    assert len(counted_later) == 1, "one of the first records is refused before anything trains"


NEEDS = {
    "rows of many steps": ["trainer.packing=true", "trainer.packing_strategy=best_fit"],
    "blocks of similar lengths": ["trainer.train_sampling_strategy=group_by_modality_blocks"],
    "skipped": ["dataset.on_bad_sample=skip"],
    "cut": ["dataset.over_length=truncate"],
    "held out": ["dataset.eval_split=0.5"],
    "features": ["dataset.cache_features=true"],
}


@pytest.mark.parametrize("words", NEEDS.values(), ids=NEEDS)
def test_runs_whose_samples_depend_on_counts_wait_for_them(words: list[str]):
    given = ["dataset.path=x.json", "trainer.packing=false", "dataset.over_length=error"]
    assert not needs_counts(compose_config("pretrain-smol", given), 1)
    assert not needs_counts(compose_config("pretrain-smol", [*given, "trainer.packing=true"]), 1)
    grouped = "trainer.train_sampling_strategy=group_by_modality_length"
    assert not needs_counts(compose_config("pretrain-smol", [*given, grouped]), 1)
    assert needs_counts(compose_config("pretrain-smol", given), 2)
    assert needs_counts(compose_config("pretrain-smol", [*given, *words]), 1)


class NoSource:
    """A source as far as its samples are not read."""

    fingerprint = "none"


def make(load: Callable[[], SampleDataset]) -> CountedLater:
    return CountedLater([NoSource()], np.zeros((3, 2), dtype=np.int64), load)  # pyright: ignore[reportArgumentType]


def load_three() -> SampleDataset:
    numbers = np.arange(3)
    return SampleDataset([], np.zeros((3, 2), dtype=np.int64), numbers, numbers, has_thinking=True)


def test_a_count_waits_for_all_of_them():
    dataset, acts = make(load_three), []
    when_counted(dataset, lambda: acts.append(dataset.has_thinking))
    assert (len(dataset), dataset.is_counted, acts) == (3, False, [])
    assert dataset.lengths.tolist() == [0, 1, 2]
    assert (dataset.is_counted, dataset.is_due, acts) == (True, False, [True])
    when_counted(dataset, lambda: acts.append("at once"))
    when_counted(object(), lambda: acts.append("at once"))
    assert acts == [True, "at once", "at once"]
    assert all(hasattr(dataset, name) for name in COUNTS)
    with pytest.raises(AttributeError, match=r"has no attribute length$"):
        dataset.length  # noqa: B018


def test_data_workers_get_what_they_read():
    dataset = make(load_three)
    other = pickle.loads(pickle.dumps(dataset))
    assert len(other) == 3
    dataset.stop()


def test_a_packed_step_has_the_lengths_of_its_samples():
    """They are measured as steps come, and each is measured once; afterwards all are known."""
    dataset, measured = make(load_three), []
    dataset.measure = lambda index: (measured.append(index) or index + 4, 1)
    sizes = MeasuredSizes(dataset, SampleCosts(token=2.0, pair=0.0, image=1.0), max_tokens=6)
    sizes.measure([2, 0])
    sizes.measure([0])
    assert (measured, sizes.lengths.tolist(), sizes.costs.tolist()) == ([2, 0], [4, 0, 6], [9, 0, 13])
    dataset.measure = lambda index: (7, 0)
    with pytest.raises(ValueError, match="a sample of 7 tokens does not fit"):
        sizes.measure([1])
    dataset.wait()
    assert (sizes.lengths.tolist(), sizes.costs.tolist()) == ([0, 1, 2], [0, 3, 6])


def fail() -> SampleDataset:
    raise ValueError("a record cannot be used")


def test_what_fails_there_fails_here():
    dataset = make(fail)
    with pytest.raises(ValueError, match="a record cannot be used"):
        dataset.wait()


def test_nothing_counts_any_more_where_training_fails():
    dataset = make(wait_for_ever)
    with pytest.raises(RuntimeError, match="out of memory"), counting(dataset):
        raise RuntimeError("out of memory")
    assert dataset._process.exitcode is not None


def test_workers_end_with_what_counts(tmp_path: Path):
    def load() -> SampleDataset:
        worker = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
        worker.start()
        (tmp_path / "part").write_text(str(worker.pid))
        (tmp_path / "part").rename(tmp_path / "pid")
        return wait_for_ever()

    dataset = make(load)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    dataset.stop()
    wait_until(lambda: has_ended(int((tmp_path / "pid").read_text())))


def has_ended(process: int) -> bool:
    """Whether a process has ended, also if nothing has asked for its exit code."""
    try:
        state = Path("/proc", str(process), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(("step", "evaluates", "saves"), [(1, False, False), (9, False, True), (1, True, True)])
def test_a_signal_ends_the_wait_and_the_run_is_saved(step: int, evaluates: bool, saves: bool):
    dataset, control = make(wait_for_ever), TrainerControl(should_evaluate=evaluates)
    signalled = SimpleNamespace(agree=lambda device: True)
    trainer: Any = SimpleNamespace(
        meter=SimpleNamespace(stop=lambda **_: None), stop_on_signal=signalled, mark_progress=lambda: None
    )
    args: Any = SimpleNamespace(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm.data.counted_later.WAIT_SECONDS", 0.01)
        FinishCounting(dataset, trainer).on_step_end(args, TrainerState(global_step=step, max_steps=9), control)
    assert (control.should_save, control.should_evaluate) == (saves, False)
    assert not dataset.is_counted
    dataset.stop()


def wait_for_ever() -> SampleDataset:
    threading.Event().wait()
    return load_three()
