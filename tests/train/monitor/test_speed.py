"""What a run says of its speed."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import refusal
from tests.train.test_distributed_runs import launch
from vlm.data.batching.collator import Collator
from vlm.data.batching.stats import BatchStats
from vlm.train.monitor import speed
from vlm.train.monitor.flops import StepFlops
from vlm.train.monitor.peak_flops import DATA_SHEET_TFLOPS, Peak, data_sheet_tflops, get_peak_tflops, measure_tflops
from vlm.train.monitor.speed import SpeedMeter
from vlm.train.trainer import VLMTrainer

CPU = torch.device("cpu")
FLOPS = StepFlops(token=1e9, pair=0.0, supervised=0.0, encoded=1e12, connected=0.0, batch=0.0)
BATCH_STATS = BatchStats(samples=2, tokens=60, positions=100, supervised=20, images=2, squared_lengths=1800)


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(speed, "time", found)
    return found


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def take_step(meter: SpeedMeter, clock: Clock, seconds: float = 2.0, wait: float = 0.5) -> None:
    """A step of so many seconds, some of them until its batch is there."""

    def arriving() -> Iterator[str]:
        clock.now += wait
        yield "batch"

    meter.begin_step()
    assert next(meter.time_waits(arriving())) == "batch"
    meter.add([(BATCH_STATS, 1, 2)])
    clock.now += seconds - wait


def test_a_measured_peak_that_a_run_exceeds_is_measured_again_and_else_gives_no_share(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    for again, expected in ((100.0, True), (0.001, False)):
        measured: list[torch.dtype] = []
        monkeypatch.setattr(speed, "measure_tflops", lambda device, dtype, again=again: measured.append(dtype) or again)  # noqa: B023
        meter = SpeedMeter(CPU, FLOPS, Peak(0.01, "measured: here"), dtype=torch.bfloat16)
        for _ in range(3):
            take_step(meter, clock)
        meter.stop()
        found = meter.gather_metrics(alone)
        assert ("mfu" in found) == expected
        assert found.get("mfu", 0) <= 1
        assert found["tflops_per_second"] > 0.01
        assert measured == [torch.bfloat16], "once"
    given = SpeedMeter(CPU, FLOPS, Peak(0.01, "trainer.peak_tflops"))
    for _ in range(3):
        take_step(given, clock)
    given.stop()
    assert given.gather_metrics(alone)["mfu"] > 1, "what the user says is not put in question"


def test_steps_are_measured_from_the_second_on(clock: Clock):
    meter = SpeedMeter(CPU, FLOPS, Peak(1.0, "given"))
    take_step(meter, clock, seconds=100.0)
    assert meter.gather_metrics(alone) == {}
    for _ in range(2):
        take_step(meter, clock)
    meter.stop()
    clock.now += 50  # evaluation
    found = meter.gather_metrics(alone)
    assert found.pop("peak_memory_gib") > 0.05
    assert found == pytest.approx({
        "tokens_per_second": 30, "supervised_tokens_per_second": 10, "samples_per_second": 1, "padding_share": 0.4,
        "data_wait_share": 0.25, "tflops_per_second": 0.53, "mfu": 0.53,
    })  # fmt: skip


def test_the_beginning_of_an_epoch_is_waiting(clock: Clock):
    meter = SpeedMeter(CPU)
    take_step(meter, clock)
    take_step(meter, clock, wait=0.0)
    meter.begin_data_wait()
    clock.now += 1  # data workers start
    take_step(meter, clock, wait=0.0)
    meter.stop()
    assert meter.gather_metrics(alone)["data_wait_share"] == pytest.approx(1 / 5)


def test_ranks_are_summed(clock: Clock):
    meter = SpeedMeter(CPU, FLOPS, Peak(1.0, "given"))
    for _ in range(3):
        take_step(meter, clock)
    meter.stop()
    found = meter.gather_metrics(lambda values: values.repeat(2, 1))
    assert found["tokens_per_second"] == pytest.approx(60)
    assert found["tflops_per_second"] == pytest.approx(0.53)
    assert meter.total_counts.steps == 2


def test_a_step_without_any_record_counts_no_token(clock: Clock):
    meter = SpeedMeter(CPU)
    take_step(meter, clock)
    meter.begin_step()
    meter.add([(BatchStats(positions=4), 0, 0)])
    clock.now += 1
    meter.stop()
    found = meter.gather_metrics(alone)
    assert (found["tokens_per_second"], found["padding_share"]) == (0, 1)


@pytest.fixture(scope="module")
def measured_run(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps of 4 samples in two batches, evaluated and saved on the way."""
    return train(
        "pretrain-smol", tmp_path_factory.mktemp("runs") / "run", "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6", "trainer.logging_steps=2",
        "trainer.eval_strategy=steps", "trainer.eval_steps=3", "dataset.eval_split=0.2", "trainer.save_strategy=steps",
        "trainer.save_steps=3", "trainer.peak_tflops=0.5", "trainer.num_samples=1", plots=True,
    )  # fmt: skip


class Leaping(Clock):
    """The real clock, as far ahead as it has leapt."""

    def perf_counter(self) -> float:
        return self.now + time.perf_counter()


LEAP = 1000.0
"""Seconds beside which those that a tiny run takes are nothing."""


@pytest.fixture
def leaps(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, float], list[float]]:
    """`leaps(class, method, seconds)`: the method takes so much longer, as the clock of a run sees it; when it was."""
    clock = Leaping()
    monkeypatch.setattr(speed, "time", clock)

    def slow(owner: type, name: str, seconds: float) -> list[float]:
        original, begun = getattr(owner, name), []

        def slower(*args: Any, **kwargs: Any) -> Any:
            begun.append(clock.now)
            clock.now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slower)
        return begun

    return slow


SHORT = (
    "trainer.per_device_train_batch_size=2",
    "trainer.max_steps=4",
    "trainer.num_samples=0",
    "dataset.eval_split=0.2",
)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("evaluate", ("trainer.eval_strategy=steps", "trainer.eval_steps=1")),
        ("_save_checkpoint", ("trainer.save_strategy=steps", "trainer.save_steps=1")),
        ("log", ("trainer.logging_steps=1",)),
    ],
)
def test_the_clock_stands_still_while_a_run_evaluates_saves_or_logs(
    leaps: Callable[..., list[float]], train: Callable[..., Path], tmp_path: Path, method: str, words: tuple[str, ...]
):
    """Each without the others: a log would stop the clock for an evaluation beside it."""
    begun = leaps(VLMTrainer, method, LEAP)
    none = ("trainer.logging_steps=100", "trainer.eval_strategy=no", "trainer.save_strategy=no")
    found = json.loads((train("pretrain-smol", tmp_path / "run", *SHORT, *none, *words) / "speed.json").read_text())
    assert len(begun) >= 4
    assert found["whole"]["steps"] == 3
    assert 0 < found["seconds"] < LEAP


@pytest.mark.parametrize(("data", "step", "share"), [(LEAP, 0.0, 1.0), (LEAP, 3 * LEAP, 0.25), (0.0, LEAP, 0.0)])
def test_the_time_in_which_data_come_is_that_of_waiting(
    leaps: Callable[..., list[float]], train: Callable[..., Path], tmp_path: Path, data: float, step: float,
    share: float,
):  # fmt: skip
    leaps(Collator, "__call__", data)
    leaps(VLMTrainer, "training_step", step)
    found = json.loads((train("pretrain-smol", tmp_path / "run", *SHORT) / "speed.json").read_text())
    assert found["data_wait_share"] == pytest.approx(share, abs=0.02)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_training_log_says_how_fast_the_run_is(measured_run: Path):
    lines = [line for line in read_lines(measured_run) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["tokens_per_second"] > line["supervised_tokens_per_second"] > line["samples_per_second"] > 0
        assert 0 <= line["padding_share"] < 1
        assert 0 < line["data_wait_share"] < 1
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)
    assert not any("tokens_per_second" in line for line in read_lines(measured_run) if "eval_loss" in line)


def test_what_the_trainer_says_of_its_speed_stays_away(measured_run: Path):
    last = next(line for line in read_lines(measured_run) if "train_runtime" in line)
    assert not {"train_samples_per_second", "train_steps_per_second", "total_flos", "tokens_per_second"} & last.keys()
    assert "train_loss" in last


def test_the_whole_run_is_summed_up(measured_run: Path):
    found = json.loads((measured_run / "speed.json").read_text())
    assert (found["first_step"], found["last_step"], found["ranks"]) == (2, 6, 1)
    total_counts = found["whole"]
    assert (total_counts["steps"], total_counts["batches"], total_counts["samples"]) == (
        5,
        10,
        19,
    )  # the last of an epoch has one
    assert total_counts["positions"] >= total_counts["tokens"] > total_counts["supervised"] > 0
    assert found["samples_per_second"] == pytest.approx(19 / found["seconds"])
    flops, tokens = found["flops"], total_counts["tokens"]
    pairs = (total_counts["squared_lengths"] + tokens) / 2
    operations = (
        flops["token"] * tokens + flops["pair"] * pairs + flops["supervised"] * total_counts["supervised"]
        + flops["encoded"] * total_counts["encoded"] + flops["connected"] * total_counts["connected"]
    )  # fmt: skip
    assert found["tflops_per_second"] == pytest.approx(operations / found["seconds"] / 1e12)
    assert found["peak"] == {"tflops": 0.5, "source": "trainer.peak_tflops"}
    assert (measured_run / "speed.png").is_file()


def test_a_resumed_run_measures_what_it_does_itself(
    measured_run: Path, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="vlm.train.monitor.speed"):
        train(
            "pretrain-smol", measured_run, "trainer.per_device_train_batch_size=2", "trainer.max_steps=6",
            "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=5", "dataset.eval_split=0.2",
            f"trainer.resume_from_checkpoint={measured_run / 'checkpoint-3'}", "trainer.num_samples=0",
        )  # fmt: skip
    found = json.loads((measured_run / "speed.json").read_text())
    assert (found["first_step"], found["last_step"]) == (5, 6)
    assert found["peak"]["source"].startswith("measured: a matrix product in float32")
    assert "Speed of steps 5 to 6" in caplog.text


def test_a_run_of_one_step_says_that_nothing_was_measured(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="vlm.train.monitor.speed"):
        folder = train("pretrain-smol", tmp_path / "run", "trainer.max_steps=1", "trainer.num_samples=0")
    assert not (folder / "speed.json").exists()
    assert "the first one does not count" in caplog.text


def test_heads_say_how_many_samples_a_second_they_see(train_head: Callable[..., Path], tmp_path: Path):
    folder = train_head("head-classification", "colour", tmp_path / "run", "trainer.max_steps=3")
    lines = [line for line in read_lines(folder) if "loss" in line]
    assert lines[-1]["samples_per_second"] > 0
    assert "tokens_per_second" not in lines[-1]


def test_the_longest_name_of_a_data_sheet_is_taken():
    assert data_sheet_tflops("NVIDIA H100 PCIe") == DATA_SHEET_TFLOPS["H100 PCIE"]
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3") == DATA_SHEET_TFLOPS["H100"]
    assert data_sheet_tflops("NVIDIA A100-SXM4-80GB") == DATA_SHEET_TFLOPS["A100"]
    assert data_sheet_tflops("NVIDIA A10") == DATA_SHEET_TFLOPS["A10"]
    assert data_sheet_tflops("NVIDIA GeForce GTX 1080") is None
    assert data_sheet_tflops("") is None


def test_a_device_that_no_sheet_knows_is_measured():
    assert measure_tflops(CPU, torch.float32, seconds=0.05) > 1e-4
    assert get_peak_tflops(CPU, torch.bfloat16, 12.5) == Peak(12.5, "trainer.peak_tflops")


def test_a_peak_of_nothing_is_refused(common: list[str]):
    assert "trainer.peak_tflops=0" in refusal("-cn", "pretrain-smol", *common, "trainer.peak_tflops=0")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_measure_together(common: list[str], measured_run: Path, tmp_path: Path, stage: str):
    """The same operations for each sample, twice the samples of a step; a profile of the first rank."""
    single = json.loads((measured_run / "speed.json").read_text())
    launch([
        "-cn", "pretrain-smol", *common, f"trainer.deepspeed={stage}", f"trainer.output_dir={tmp_path}",
        "trainer.per_device_train_batch_size=2", "trainer.max_steps=8", "trainer.logging_steps=3",
        "trainer.profile=true", "trainer.num_samples=0",
    ])  # fmt: skip
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (found["ranks"], found["first_step"], found["last_step"]) == (2, 2, 8)
    assert (found["whole"]["steps"], found["whole"]["batches"], found["whole"]["samples"]) == (7, 14, 28)
    assert found["flops"] == single["flops"]
    assert "language_model backward" in (tmp_path / "profile" / "table.txt").read_text()
