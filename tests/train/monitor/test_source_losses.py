"""The training loss of each source, padded and packed, against what its samples have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.data.batching.packing import SEQUENCE_STARTS
from vlm.data.dataset import SampleRef
from vlm.data.encoding.labels import IGNORE_INDEX as NOT
from vlm.train.monitor.source_losses import SourceLosses, count_supervised, make_source_losses

PATHS = {"a.json": "first", "b.json": "second"}
REFS = [SampleRef(path, number, str(number)) for number, path in enumerate(["b.json", "a.json", "b.json"])]
LABELS = [[NOT, 1, 1, NOT], [NOT, NOT, 1, NOT], [NOT, 1, 1, 1]]
LOSSES = torch.tensor([1.0, 2.0, 10.0, 3.0, 4.0, 5.0])


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


@pytest.mark.parametrize("packed", [False, True])
def test_losses_are_those_of_the_samples(packed: bool):
    labels = torch.tensor(LABELS)
    inputs: dict[str, Any] = {"labels": labels}
    if packed:  # the last sequence is a dummy
        inputs["labels"] = torch.cat([labels.reshape(1, -1), torch.full((1, 2), NOT)], dim=1)
        inputs[SEQUENCE_STARTS] = torch.tensor([0, 4, 8, 12, 14])
    assert count_supervised(inputs).tolist() == [2, 1, 3, *([0] if packed else [])]
    found = SourceLosses(PATHS, lambda: REFS, torch.device("cpu"))
    found.add(LOSSES, inputs)
    found.add(LOSSES, inputs)
    assert found.pop_metrics(alone) == {"loss/first": 10.0, "loss/second": 3.0}
    assert found.pop_metrics(alone) == {}, "since the last log"


def test_ranks_are_added_up_by_tokens():
    found = SourceLosses(PATHS, lambda: REFS, torch.device("cpu"))
    found.add(LOSSES, {"labels": torch.tensor(LABELS)})
    other = torch.tensor([[[0.0, 30.0, 0.0], [0.0, 5.0, 0.0]]])
    assert found.pop_metrics(lambda own: torch.cat([own, other])) == {"loss/first": 10.0, "loss/second": 4.5}


def test_a_batch_of_which_no_sample_is_left_counts_for_none():
    found = SourceLosses(PATHS, list, torch.device("cpu"))
    found.add(torch.tensor([]), {"labels": torch.tensor([[NOT]])})
    assert found.pop_metrics(alone) == {}


def test_one_source_needs_no_loss_of_its_own():
    assert make_source_losses(object(), list, torch.device("cpu")) is None


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_mixture_logs_them_in_training_and_evaluation(
    train: Callable[..., Path], world: Path, tmp_path: Path, packing: str
):
    records = json.loads((world / "records.json").read_text())
    for name, own in (("short", records[:10]), ("long", records[10:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    run = train(
        "finetune-smol", tmp_path / "run", "dataset.path=null", f"trainer.packing={packing}", "dataset.eval_split=0.3",
        *(f"dataset.sources.{name}.path={tmp_path / name}.json" for name in ("short", "long")),
        "trainer.max_steps=1", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.num_samples=0",
        "trainer.learning_rate.language_model_learning_rate=1e-4", "trainer.save_strategy=no",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for total, line in (("loss", lines[0]), ("eval_loss", next(line for line in lines if "eval_loss" in line))):
        found = [line[f"{total}/{name}"] for name in ("short", "long")]
        assert min(found) <= line[total] <= max(found), "a mean of both"
