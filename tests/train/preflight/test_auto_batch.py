"""Rows are as long as memory allows, by prediction; a run that is resumed keeps what its first start has found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.fixtures import check_config, compose_config, losses
from tests.train.preflight.conftest import WORDS
from vlm.assembly.resolve import resolve_model
from vlm.train.arguments import training_arguments
from vlm.train.objectives.table import make_objective
from vlm.train.preflight import auto_batch
from vlm.train.preflight.auto_batch import choose_max_tokens, read_recorded, search

AUTO = ("trainer.auto_batch=true", "dataset.max_length=64")


@pytest.mark.parametrize(("limit", "tokens"), [(10, 100), (1000, 960), (99_999, 4000)])
def test_the_largest_number_within_the_limit_is_found(limit: int, tokens: int):
    assert search(lambda number: number, limit, least=100, most=4000) == tokens


def test_more_memory_makes_longer_rows(common: list[str]):
    found = []
    for gigabytes in (0.0001, 0.004, 0.5):
        config = compose_config("finetune-smol", [*common, *WORDS, *AUTO, f"trainer.auto_batch_memory_gb={gigabytes}"])
        args = training_arguments(config.trainer)
        found.append(choose_max_tokens(make_objective(config), *resolve_model(config), args))
    assert found[0] == 64  # one sample, which does not fit
    assert 64 < found[1] < found[2] == 8 * 64  # all samples of a step


def test_a_run_records_what_it_found_and_keeps_it(train: Callable[..., Path], tmp_path: Path):
    words = (*WORDS, *AUTO, "trainer.save_strategy=steps", "trainer.save_steps=1")
    run = train("finetune-smol", tmp_path, *words, "trainer.auto_batch_memory_gb=0.5", "trainer.max_steps=1")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_tokens_per_batch"] == 512
    assert read_recorded("auto", run) == 512
    assert read_recorded("never", run) is None
    train("finetune-smol", tmp_path, *words, "trainer.auto_batch_memory_gb=0.0001", "trainer.max_steps=2")
    assert len(losses(run)) == 2  # not refused, as a changed max_tokens_per_batch would be


def test_ranks_agree_on_what_fits_on_every_one(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = compose_config("finetune-smol", [*common, *WORDS, *AUTO])
    monkeypatch.setattr(auto_batch, "choose_max_tokens", lambda *given: 512)
    monkeypatch.setattr(auto_batch, "all_gather_objects", lambda own: [own, 256])  # another rank has less memory
    args = training_arguments(config.trainer)
    auto_batch.set_auto_batch(make_objective(config), *resolve_model(config), args, tmp_path)
    assert config.trainer.max_tokens_per_batch == 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.packing=false"], "it needs trainer.packing=true"),
        (["trainer.packing_strategy=best_fit", "trainer.train_sampling_strategy=random"], "packing_strategy=step"),
        (
            ["trainer.max_tokens_per_batch=64"],
            "trainer.auto_batch=true and trainer.max_tokens_per_batch=64: choose one",
        ),
        (["trainer.auto_batch=false", "trainer.auto_batch_memory_gb=1"], "no effect without trainer.auto_batch=true"),
    ],
)
def test_what_it_does_not_go_with_is_refused(common: list[str], words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        check_config(compose_config("finetune-smol", [*common, *WORDS, *AUTO, *words]))
