"""Runs that pack preferences: losses, gradients and rewards are those of padded rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import check_config, compose_config
from tests.train.objectives.preference_runs import WORDS, write_preferences
from tests.train.test_distributed_runs import launch
from vlm.checks.fields import ConfigError

NAMES = ("loss", "grad_norm", "reward_chosen", "reward_rejected", "margin", "reward_accuracy")
WHOLE = ("trainer/lora=none", "trainer.unfreeze.train_language_model=true", "trainer.unfreeze.train_connector=true")


def read_steps(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in NAMES if name in line] for line in lines if "grad_norm" in line]


@pytest.mark.parametrize(
    "words",
    [
        (*WHOLE, "trainer.gradient_accumulation_steps=2", "trainer.max_tokens_per_batch=200"),
        ("trainer.preference.reference=copy", "trainer.lora.dropout=0"),
        ("trainer.lora.dropout=0",),
        ("trainer.preference.loss=kto", "trainer.lora.dropout=0"),
    ],
)
def test_a_packed_run_is_the_padded_one(
    train: Callable[..., Path], world: Path, tmp_path: Path, words: tuple[str, ...]
):
    data = write_preferences(world, tmp_path / "pairs.json", labelled="trainer.preference.loss=kto" in words)
    common = [*data, *WORDS, "trainer.max_steps=2", "trainer.eval_strategy=no", "dataset.eval_split=null", *words]
    padded = [*(word for word in common if "max_tokens" not in word), "trainer.packing=false"]
    expected = read_steps(train("preference-smol", tmp_path / "padded", *padded))
    found = read_steps(train("preference-smol", tmp_path / "packed", *common, "trainer.packing=true"))
    assert len(found) == 2
    for step, other in zip(found, expected, strict=True):
        assert step == pytest.approx(other, abs=1e-5, rel=1e-4)


def test_attention_without_shared_prompts_is_refused(train: Callable[..., Path], world: Path, tmp_path: Path):
    data = write_preferences(world, tmp_path / "pairs.json")
    words = ["trainer.packing=true", "model.attn_implementation=eager", "trainer.preference.loss=simpo"]
    with pytest.raises(ValueError, match="in a packed row, the logits of a reply differ from those without packing"):
        train("preference-smol", tmp_path / "run", *data, *WORDS, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.packing_strategy=best_fit"], "the records of a micro-batch share rows; choose step"),
        (["trainer.max_tokens_per_batch=99", "trainer.preference.loss=kto"], "loss=kto estimates its reference point"),
    ],
)
def test_what_does_not_go_with_packed_preferences_is_refused(
    common: list[str], world: Path, tmp_path: Path, words: list[str], message: str
):
    data = write_preferences(world, tmp_path / "pairs.json")
    with pytest.raises(ConfigError, match=message):
        check_config(compose_config("preference-smol", [*common, *data, *WORDS, "trainer.packing=true", *words]))


@pytest.mark.slow
def test_a_resumed_packed_run_goes_on_where_it_was(train: Callable[..., Path], world: Path, tmp_path: Path):
    """Over two epochs in random order, with evaluations, which are padded."""
    data = write_preferences(world, tmp_path / "pairs.json")
    words = [
        *data, *WORDS, *WHOLE, "trainer.packing=true", "trainer.train_sampling_strategy=random",
        "trainer.num_train_epochs=2", "trainer.save_strategy=steps", "trainer.save_steps=3", "trainer.max_steps=-1",
    ]  # fmt: skip
    whole = train("preference-smol", tmp_path / "whole", *words)
    train("preference-smol", tmp_path / "half", *words, "trainer.max_steps=3")
    half = train("preference-smol", tmp_path / "half", *words)
    assert len(read_steps(whole)) > 4
    assert read_steps(half) == read_steps(whole)


@pytest.mark.slow
def test_two_packed_ranks_make_the_padded_steps(
    train: Callable[..., Path], common: list[str], world: Path, tmp_path: Path
):
    """Where one rank's records need more rows than the other's, that one has rows without records."""
    data = write_preferences(world, tmp_path / "pairs.json")
    words = [
        *data, *WORDS, *WHOLE, "trainer.train_sampling_strategy=sequential", "trainer.eval_strategy=no",
        "dataset.eval_split=null", f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    alone = ["trainer.per_device_train_batch_size=6", "trainer.packing=false"]
    single = train("preference-smol", tmp_path / "single", *words, *alone)
    two = ["trainer.per_device_train_batch_size=3", "trainer.packing=true", "trainer.max_tokens_per_batch=170"]
    launch(["-cn", "preference-smol", *common, *words, *two, f"trainer.output_dir={tmp_path / 'two'}"])
    steps = read_steps(single)
    assert read_steps(tmp_path / "two") == [pytest.approx(step, rel=1e-4, abs=1e-5) for step in steps]
