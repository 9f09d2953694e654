"""Weights of replies: the loss is their weighted mean, over a step or a micro-batch, padded and packed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm.data.batching.collator import Collator
from vlm.data.batching.packing import PackingCollator
from vlm.data.dataset import LOSS_WEIGHTS

WEIGHTS = (0.5, 2, True, 0, 3.5)


def item(ids: list[int], labels: list[int], weights: list[float] | None = None) -> dict[str, Any]:
    own = {} if weights is None else {LOSS_WEIGHTS: torch.tensor(weights)}
    return {"input_ids": ids, "labels": labels, **own}


ITEMS = [item([1, 2, 3], [-100, 2, 3], [1.0, 0.5, 0.5]), item([4, 5, 6, 7], [-100, -100, 6, 7])]


def test_rows_are_padded_with_weights_of_one():
    batch = Collator(0)([*ITEMS])
    assert batch[LOSS_WEIGHTS].tolist() == [[1, 0.5, 0.5, 1], [1, 1, 1, 1]]
    assert batch[LOSS_WEIGHTS].dtype == torch.float32
    assert LOSS_WEIGHTS not in Collator(0)(ITEMS[1:])


def test_packed_rows_have_the_weights_of_their_tokens():
    packed = PackingCollator(Collator(0))([*ITEMS])
    assert packed[LOSS_WEIGHTS].tolist() == [[1, 0.5, 0.5, 1, 1, 1, 1]]
    assert packed["labels"].tolist() == [[-100, 2, 3, -100, -100, 6, 7]]


@pytest.fixture
def records(world: Path, tmp_path: Path) -> Path:
    """The records of the tiny world with a weight for each reply."""
    rows = json.loads((world / "records.json").read_text())
    number = 0
    for row in rows:
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                turn["weight"] = WEIGHTS[number % len(WEIGHTS)]
                number += 1
        row["conversations"][-1]["weight"] = row["conversations"][-1]["weight"] or 1.5
    (tmp_path / "weighted.json").write_text(json.dumps(rows))
    return tmp_path / "weighted.json"


RUN = (
    "trainer.learning_rate.language_model_learning_rate=1e-2",
    "trainer.learning_rate.connector_learning_rate=1e-2",
    "trainer.num_samples=0",
    "trainer.optim=sgd",
    "trainer.max_grad_norm=0",
    "trainer.lr_scheduler_type=constant",
    "trainer.warmup_steps=0",
    "trainer.per_device_train_batch_size=3",
    "trainer.gradient_accumulation_steps=2",
    "trainer.train_sampling_strategy=sequential",
    "trainer.save_strategy=no",
    "trainer.max_steps=2",
)


def losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line]


def reference_loss(batches: list[dict[str, Any]], model: Any, average: str) -> float:
    """The loss of a step, from logits of the whole vocabulary, in ten lines."""
    sums, weights = [], []
    for batch in batches:
        logits = model(**{name: value for name, value in batch.items() if name not in ("labels", LOSS_WEIGHTS)}).logits
        labels, weight = batch["labels"][:, 1:], batch.get(LOSS_WEIGHTS, torch.ones(batch["labels"].shape))[:, 1:]
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels, reduction="none")
        weight = weight * (labels != -100)
        sums.append((loss * weight).sum().item())
        weights.append(weight.sum().item())
    if average == "token":
        return sum(sums) / sum(weights)
    return sum(total / weight for total, weight in zip(sums, weights, strict=True)) / len(sums)


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_a_run_has_the_weighted_mean(
    train: Callable[..., Path], tmp_path: Path, records: Path, average: str, monkeypatch: pytest.MonkeyPatch
):
    """Padded, as the reference has it; packed by steps the same; and an evaluation leaves weights out."""
    from vlm.train.trainer import VLMTrainer

    seen: list[tuple[dict[str, Any], Any]] = []
    compute = VLMTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(seen) < 2:
            plain = self.accelerator.unwrap_model(model)
            with torch.no_grad():
                seen.append(({name: value.clone() for name, value in inputs.items()}, None))
                if len(seen) == 2:
                    expected.append(reference_loss([batch for batch, _ in seen], plain, average))
        return compute(self, model, inputs, *args, **kwargs)

    expected: list[float] = []
    monkeypatch.setattr(VLMTrainer, "compute_loss", watched)
    words = (*RUN, f"trainer.loss_average={average}", f"dataset.path={records}")
    padded = losses(train("finetune-smol", tmp_path / "padded", *words))
    assert any(LOSS_WEIGHTS in batch for batch, _ in seen)
    assert padded[0][0] == pytest.approx(expected[0], rel=1e-4)
    packed = train("finetune-smol", tmp_path / "packed", *words, "trainer.packing=true")
    assert losses(packed) == [pytest.approx(step, rel=1e-4, abs=1e-4) for step in padded]


def test_an_objective_that_does_not_weigh_is_refused(
    train: Callable[..., Path], tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
):
    from vlm.train.objectives.generation import Generation

    monkeypatch.setattr(Generation, "takes_loss_weights", False)
    with pytest.raises(ValueError, match="does not weight losses"):
        train("finetune-smol", tmp_path / "run", *RUN, f"dataset.path={records}", "trainer.loss_average=token")
