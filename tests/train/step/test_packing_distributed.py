"""Packed rows on two ranks, the vocabulary in pieces: the losses of one process, and the same after a stop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import losses
from tests.train.test_distributed_runs import launch
from vlm.train.checkpoints import newest_checkpoint
from vlm.train.step import chunked_loss as vocabulary

PACKED = [
    "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.packing=true",
    "trainer.max_tokens_per_batch=180",
    "trainer.num_train_epochs=2",
    "trainer.save_strategy=steps",
    "trainer.save_steps=3",
    "trainer.num_samples=0",
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_reach_the_single_process(
    common: list[str], train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """Each step has the packs that two accumulated batches of one process have; some are without pictures."""
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", 2**26)
    single = train("finetune-smol", tmp_path / "single", *PACKED, "trainer.gradient_accumulation_steps=2")
    two = tmp_path / "two"
    words = ["-cn", "finetune-smol", *common, *PACKED, f"trainer.deepspeed={stage}", f"trainer.output_dir={two}"]
    launch(words, "tests.train.step.small_pieces")
    assert len(losses(single)) > 4
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)
    last = newest_checkpoint(two)
    if last.name != "checkpoint-3":
        (last / "complete").unlink()
    assert newest_checkpoint(two).name == "checkpoint-3"
    launch([*words, "trainer.resume_from_checkpoint=true"], "tests.train.step.small_pieces")
    assert losses(two) == pytest.approx(losses(single), abs=2e-4)
