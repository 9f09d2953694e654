"""Rows of about equal length out of all samples, in a run and in a stream."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import compose_config, losses
from vlm.data.batching.best_fit import PackSampler
from vlm.train.step.best_fit_loader import PackedStream

WORDS = (
    "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.num_samples=0",
    "trainer.train_sampling_strategy=random",
)
BEST_FIT = (*WORDS, "trainer.packing=true", "trainer.packing_strategy=best_fit", "trainer.max_tokens_per_batch=256")


def test_a_packed_run_trains_as_a_padded_one_of_the_same_samples(
    train: Callable[..., Path], common: list[str], tmp_path: Path
):
    """All 24 records in one step, packed in several rows, or padded in several batches: the same losses."""
    whole = "trainer.num_train_epochs=3"
    padded = train(
        "finetune-smol",
        tmp_path / "padded",
        *WORDS,
        whole,
        "trainer.per_device_train_batch_size=8",
        "trainer.gradient_accumulation_steps=3",
        "trainer.packing=false",
    )
    order = PackSampler(read_lengths(common), 256, seed=42)
    found = train(
        "finetune-smol", tmp_path / "packed", *BEST_FIT, whole, f"trainer.gradient_accumulation_steps={len(order)}"
    )
    assert len(order) > 2
    assert losses(found) == pytest.approx(losses(padded), abs=1e-4)
    assert losses(found)[0] > losses(found)[-1]
    assert (found / "first_batch.html").read_text().count(" tokens, ") > 1


def read_lengths(common: list[str]) -> Any:
    """The lengths of the tiny world's samples."""
    from vlm.assembly.resolve import resolve_model
    from vlm.train.arguments import training_arguments
    from vlm.train.objectives.table import make_objective

    config = compose_config("finetune-smol", [*common, *WORDS])
    model_config, processor = resolve_model(config)
    data: Any = make_objective(config).load_data(model_config, processor, training_arguments(config.trainer)).train
    return data.lengths


def test_a_streams_packs_are_full_and_leave_nothing_out():
    samples = [{"input_ids": [1] * (3 + number * 7 % 20), "number": number} for number in range(2000)]
    packs = list(islice(PackedStream(iter(samples), 64), 200))  # pyright: ignore[reportArgumentType]
    tokens = [sum(len(one["input_ids"]) for one in pack_lengths) for pack_lengths in packs]
    assert max(tokens) <= 64
    assert sum(tokens) / len(tokens) >= 0.98 * 64
    numbers = [one["number"] for pack_lengths in packs for one in pack_lengths]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("most", ["256", "null"])
def test_a_streaming_run_packs(train: Callable[..., Path], tmp_path: Path, most: str):
    folder = train(
        "finetune-smol",
        tmp_path / "run",
        *BEST_FIT,
        "dataset.streaming=true",
        "dataset.max_length=200",
        "trainer.max_steps=3",
        f"trainer.max_tokens_per_batch={most}",
    )
    assert len(losses(folder)) == 3
