"""Steps that are not finite: no update, no checkpoint of them, their samples named; on one rank and on two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.forked import run_ranks
from vlm.train.guards.errors import GuardStop
from vlm.train.objectives.generation import Generation

SHORT = [
    "trainer.num_train_epochs=3", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.logging_steps=50",
    "trainer.num_samples=0", "trainer.save_total_limit=9",
]  # fmt: skip
compute = Generation.compute_loss


def poison(monkeypatch: pytest.MonkeyPatch, at: set[int], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the losses of the steps `at`, from 1."""

    def compute_loss(self: Generation, trainer: Any, *args: Any) -> tuple[torch.Tensor, Any]:
        loss, outputs = compute(self, trainer, *args)
        return make(loss) if trainer.state.global_step + 1 in at else loss, outputs

    monkeypatch.setattr(Generation, "compute_loss", compute_loss)


def guarded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]


def weights_are_finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder).values())


POISONS = {
    "nan": lambda loss: loss * torch.nan,
    "constant": lambda loss: loss + torch.nan,  # whose gradient is finite by itself
    "infinite": lambda loss: loss * torch.inf,
}


@pytest.mark.parametrize("kind", POISONS)
def test_a_run_stops_before_the_update(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    kind: str,
):  # fmt: skip
    """Also between two logs; its checkpoints are finite, and the message says so."""
    poison(monkeypatch, {5}, POISONS[kind])
    with pytest.raises(GuardStop) as ended:
        train("pretrain-smol", tmp_path, *SHORT)
    assert ended.value.code == 76
    assert "Step 5: the loss is not finite" in caplog.text
    assert str(tmp_path / "guard.jsonl") in caplog.text
    assert not (tmp_path / "final").exists()
    checkpoints = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    assert all(weights_are_finite(tmp_path / name / "trained.safetensors") for name in checkpoints)
    (line,) = guarded(tmp_path)
    (call,) = line["ranks"][0]
    assert line["step"] == 5
    assert call["loss"] in ("nan", "inf")
    assert len(call["samples"]) == 8
    assert {"source", "record", "id"} == call["samples"][0].keys()
    assert all(str(ref["record"]) == ref["id"] for ref in call["samples"])


def test_a_gradient_alone_may_be_infinite(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The loss is finite, and so is what is said of it."""

    def make(loss: torch.Tensor) -> torch.Tensor:
        return loss + 0 * torch.sqrt(loss - loss.detach())  # the slope of a root at 0

    poison(monkeypatch, {1}, make)
    with pytest.raises(GuardStop):
        train("pretrain-smol", tmp_path, *SHORT)
    assert "Step 1: the gradient norm is nan, although the loss is finite" in caplog.text


OPTIONS = {
    "plain": [],
    "accumulated": ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"],
    "packed": ["trainer.packing=true", "trainer.gradient_accumulation_steps=2", "trainer.max_tokens_per_batch=60",
               "trainer.per_device_train_batch_size=4"],
    "unclipped": ["trainer.max_grad_norm=0"],
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_updates_are_left_out(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):  # fmt: skip
    """The run has the losses of one whose batches had no gradient at these steps, and counts them."""
    options = [*SHORT, *OPTIONS[kind], "trainer.on_nonfinite=skip", "trainer.logging_steps=1", "trainer.optim=sgd",
               "trainer.lr_scheduler_type=constant"]  # fmt: skip
    poison(monkeypatch, {2, 3}, lambda loss: loss * 0)  # SGD stays where it is
    still = losses(train("pretrain-smol", tmp_path / "still", *options))
    poison(monkeypatch, {2, 3}, lambda loss: loss * torch.nan)
    run = train("pretrain-smol", tmp_path / "run", *options)
    assert losses(run) == [still[0], *still[3:]]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line][:5] == [0, 1, 2, 2, 2]
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses(run)) / len(losses(run)))
    assert [line["step"] for line in guarded(run)] == [2, 3]
    assert weights_are_finite(run / "final" / "model.safetensors")


def test_too_many_in_a_row_end_the_run(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    poison(monkeypatch, {2, 4, 5, 6}, lambda loss: loss * torch.nan)
    options = [*SHORT, "trainer.on_nonfinite=skip", "trainer.max_skipped_steps=2"]
    with pytest.raises(GuardStop):
        train("pretrain-smol", tmp_path, *options)
    assert "Step 6" in caplog.text
    assert "3 updates in a row were skipped" in caplog.text


def test_weights_that_an_update_made_infinite_are_not_saved(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def step(self: torch.optim.SGD, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    options = ["trainer.max_steps=1"]
    with pytest.raises(GuardStop):
        train("pretrain-smol", tmp_path, *SHORT, *options, "trainer.save_strategy=no", "trainer.optim=sgd")
    assert "final is not written: weights are NaN or infinite (connector" in caplog.text
    assert not (tmp_path / "final").exists()


def slow(*stages: str) -> list[Any]:
    return [pytest.param(stage, marks=pytest.mark.slow) for stage in stages]


@pytest.mark.parametrize("stage", ["null", "zero3", *slow("zero0", "zero2")])
def test_ranks_leave_the_same_update_out(common: list[str], tmp_path: Path, stage: str):
    """One rank's loss is NaN at the second of three steps; each rank's samples are listed."""
    words = [
        "--poison=2,nan", "-cn", "pretrain-smol", *common, *SHORT,
        "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.bf16=false",
        "trainer.per_device_train_batch_size=4", "trainer.on_nonfinite=skip", f"trainer.deepspeed={stage}",
        f"trainer.output_dir={tmp_path}",
    ]  # fmt: skip
    for done in run_ranks("tests.train.guards.poisoned", words):
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [(line["step"], line["skipped_steps"]) for line in lines if "skipped_steps" in line]
    assert counts == [(1, 0), (2, 1), (3, 1)]
    rates = [line["learning_rate/connector"] for line in lines if "learning_rate/connector" in line]
    assert len(set(rates)) == 3
    (line,) = guarded(tmp_path)
    assert [call["loss"] == "nan" for (call,) in line["ranks"]] == [False, True]
    assert [len(call["samples"]) for (call,) in line["ranks"]] == [4, 4]
    assert weights_are_finite(tmp_path / "final" / "model.safetensors")


def test_ranks_stop_together(common: list[str], tmp_path: Path):
    """In bfloat16 too, and with several batches a step; no rank waits for another."""
    words = [
        "--poison=2,nan", "-cn", "pretrain-smol", *common, *SHORT,
        "trainer.max_steps=3", "trainer.bf16=true", "trainer.deepspeed=zero2",
        "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
        f"trainer.output_dir={tmp_path}",
    ]  # fmt: skip
    assert {done.returncode for done in run_ranks("tests.train.guards.poisoned", words)} <= {76, -9}
    assert "the loss is not finite" in guarded(tmp_path)[0]["found"]
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("stage", ["zero2", *slow("null", "zero0", "zero3")])
def test_ranks_leave_a_spike_out(common: list[str], tmp_path: Path, stage: str):
    """One rank's loss is a thousand times too high at the fourth step; what two steps had is usual."""
    words = [
        "--poison=4,1000", "-cn", "pretrain-smol", *common, *SHORT, "trainer.max_steps=5", "trainer.logging_steps=1",
        "trainer.bf16=false", "trainer.per_device_train_batch_size=4", "trainer.spike_action=skip",
        "trainer.spike_window=2", "trainer.spike_threshold=100", f"trainer.deepspeed={stage}", "trainer.save_steps=1",
        f"trainer.output_dir={tmp_path}",
    ]  # fmt: skip
    for done in run_ranks("tests.train.guards.poisoned", words):
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [0, 0, 0, 1, 1]
    (line,) = guarded(tmp_path)
    assert (line["step"], line["action"]) == (4, "skip")
    assert "deviations above the usual" in line["found"]
    before, after = (load_checkpoint(tmp_path, step) for step in (3, 4))
    assert before == after
    assert before != load_checkpoint(tmp_path, 5)


def load_checkpoint(run: Path, step: int) -> dict[str, list[float]]:
    """The weights of the connector in a checkpoint, of DeepSpeed or not."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # slow to import

    folder = run / f"checkpoint-{step}"
    if (folder / "trained.safetensors").exists():
        state = load_file(folder / "trained.safetensors")
    elif list(folder.glob("global_step*/*optim_states.pt")):
        state = get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        (file,) = folder.glob("global_step*/*model_states.pt")
        state = torch.load(file, weights_only=False)["module"]
    weights = {name: tensor.tolist() for name, tensor in state.items() if name.startswith("connector")}
    assert weights
    return weights


def test_a_spike_is_told_and_a_resumed_run_tells_the_same(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The numbers of earlier steps are in the checkpoint."""
    poison(monkeypatch, {5}, lambda loss: loss * 1000)
    words = [*SHORT, "trainer.spike_window=4", "trainer.spike_threshold=100"]
    run = train("pretrain-smol", tmp_path, *words)
    (line,) = guarded(run)
    assert (line["step"], line["action"]) == (5, "warn")
    train("pretrain-smol", tmp_path, *words, f"trainer.resume_from_checkpoint={run / 'checkpoint-4'}")
    assert guarded(run) == [line]


def test_a_resumed_run_logs_what_was_left_out_before(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between two logs: the mean is over the steps that count, and the step is listed once."""

    def logged(run: Path) -> list[Any]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line[name] for line in lines for name in ("loss", "skipped_steps", "train_loss") if name in line]

    poison(monkeypatch, {2}, lambda loss: loss * torch.nan)
    words = [*SHORT, "trainer.max_steps=4", "trainer.logging_steps=4", "trainer.on_nonfinite=skip"]
    run = train("pretrain-smol", tmp_path, *words)
    expected = logged(run)
    assert len(expected) == 3
    train("pretrain-smol", tmp_path, *words, f"trainer.resume_from_checkpoint={run / 'checkpoint-2'}")
    assert logged(run) == expected
    assert [line["step"] for line in guarded(run)] == [2]
