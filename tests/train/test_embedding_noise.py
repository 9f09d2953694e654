"""NEFTune: `trainer.neftune_noise_alpha` adds noise to the embeddings of training, and to nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import losses
from vlm.train.monitor.callbacks import read_metrics


def first_evaluation(folder: Path) -> float:
    return next(line["eval_loss"] for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_noise_is_in_training_steps_alone(train: Callable[..., Path], tmp_path: Path, packing: str):
    options = [
        "trainer.max_steps=2", "trainer.num_samples=0", "trainer.eval_strategy=steps", "trainer.eval_steps=1",
        "trainer.eval_on_start=true", "dataset.eval_split=0.25", f"trainer.packing={packing}",
    ]  # fmt: skip
    plain = train("finetune-smol", tmp_path / "plain", *options)
    noisy, again = (
        train("finetune-smol", tmp_path / name, *options, "trainer.neftune_noise_alpha=5")
        for name in ("noisy", "again")
    )
    assert first_evaluation(noisy) == first_evaluation(plain)
    assert losses(noisy) == losses(again)
    assert losses(noisy)[0] != losses(plain)[0]
