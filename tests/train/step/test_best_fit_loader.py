"""Rows of about equal length out of all samples, in a run and in a stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures import compose_config, losses
from vlm.data.batching.best_fit import PackSampler
from vlm.data.stream import ReaderPosition
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


@dataclass
class Samples:
    """Stands for a stream of samples of these lengths, from a position on."""

    lengths: list[int]
    position: ReaderPosition = field(default_factory=lambda: ReaderPosition(0, 0, (), 0))

    def draws(self) -> Iterator[Any]:
        for number in range(self.position.drawn, len(self.lengths)):
            is_new = number >= self.position.until
            if is_new or number in self.position.pending:
                sample = {"input_ids": [1] * self.lengths[number], "number": number}
                before, behind = (ReaderPosition(0, end, (), end) for end in (number, number + 1))
                yield SimpleNamespace(
                    number=number, encode=lambda sample=sample: sample, before=before, behind=behind,
                    is_repeated=not is_new,
                )  # fmt: skip


def take_packs(samples: Samples, capacity: int, number: int) -> list[Any]:
    return list(islice(PackedStream(samples, capacity), number))  # pyright: ignore[reportArgumentType]


def test_a_streams_packs_are_the_same_from_any_of_them_on():
    """What waits for a pack does not wait for ever, so a resumed run reads little again."""
    random = Random(0)
    lengths = [max(1, min(2000, int(random.lognormvariate(5, 0.8)))) for _ in range(8000)]
    packs = take_packs(Samples(lengths), 2048, 300)
    for taken in (1, 100, 250):
        position = packs[taken - 1].position
        rest = take_packs(Samples(lengths, position), 2048, 300 - taken)
        assert [pack.value for pack in rest] == [pack.value for pack in packs[taken:]]
    assert 500 < max(pack.position.until - pack.position.drawn for pack in packs) < 1200


def test_a_streams_packs_are_full_and_leave_nothing_out():
    found = take_packs(Samples([3 + number * 7 % 20 for number in range(2000)]), 64, 200)
    packs = [pack.value for pack in found]
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
