"""Runs that learn preferences: references that say the same, what is logged and refused; ranks and resumed runs."""

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families.tiny_families import save_family
from tests.fixtures import check_config, compose_config, losses
from tests.train.objectives.preference_runs import WORDS, write_preferences
from tests.train.test_distributed_runs import launch
from vlm.checks.fields import ConfigError
from vlm.config.choices import PREFERENCE_METRICS
from vlm.config.derived import get_value
from vlm.train.preference import reference

Train = Callable[..., Path]
WHOLE = ["trainer/lora=none", "trainer.unfreeze.train_language_model=true", "trainer.unfreeze.train_connector=true"]
"""Overrides with which connector and language model train as a whole."""


@pytest.fixture(scope="module")
def pairs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_preferences(world, tmp_path_factory.mktemp("preferences") / "pairs.json")


@pytest.fixture(scope="module")
def finished(train: Train, pairs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of whole parts, whose reference is cached."""
    folder = tmp_path_factory.mktemp("preference") / "run"
    return train("preference-smol", folder, *pairs, *WORDS, *WHOLE, "trainer.eval_on_start=true")


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_run_logs_and_measures_preferences(finished: Path):
    assert losses(finished)[0] == pytest.approx(np.log(2), abs=1e-5), "the model is its own reference before it trains"
    for name in PREFERENCE_METRICS:
        assert len(logged(finished, name)) == 4
        assert len(logged(finished, f"eval_{name}")) == 3
        known = 3 if name == "reward_accuracy" else 2  # before it trains, all pairs agree: only a share has an interval
        assert len(logged(finished, f"eval_{name}_ci95")) == known
    assert logged(finished, "margin")[0] == pytest.approx(0, abs=1e-6)
    assert logged(finished, "margin")[-1] > 1e-4
    start, _, end = logged(finished, "eval_margin")
    assert abs(start) < 1e-6 < end
    assert logged(finished, "eval_loss")[-1] < losses(finished)[0]
    assert (finished / "final" / "model.safetensors").is_file()
    assert "a red square" in (finished / "first_batch.html").read_text()


def test_a_further_run_reads_what_the_reference_said(
    train: Train, pairs: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def compute(*given: Any) -> Any:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(reference.CachedReference, "_compute", compute)
    again = train("preference-smol", tmp_path / "run", *pairs, *WORDS, *WHOLE, "trainer.eval_on_start=true")
    assert losses(again) == losses(finished)
    files = {path.name: np.load(path) for path in (finished / "references").iterdir()}
    assert sorted(map(len, files.values())) == [6, 18]
    assert all(not np.isnan(table[:, :2]).any() for table in files.values())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trainer.loss_average=micro_batch"], "a mean over the pairs of a step"),
        (["trainer.eval_metrics=[bleu]"], "preferences have their own metrics"),
        (["dataset.streaming=true", "dataset.eval_split=null", "trainer.eval_strategy=no"], "counted before training"),
        (["dataset.over_length=truncate"], "never cut"),
        (["dataset.cache_features=true"], "not cached for preferences"),
        (["dataset.supervise=llava-onevision"], "the replies of both sides are compared"),
        (["model.head.task=binary"], "trains no head"),
        (["trainer.preference.loss=nope"], "allowed are dpo"),
        (["trainer.preference.beta=0"], "a number above 0"),
        (["trainer.preference.label_smoothing=0.5"], "below 0.5"),
        (["trainer.preference.loss=ipo", "trainer.preference.label_smoothing=0.1"], "loss=ipo does not use it"),
        (["trainer.preference.simpo_gamma=2"], "it is for trainer.preference.loss=simpo, but the loss is dpo"),
        (["trainer.preference.desirable_weight=2"], "it is for trainer.preference.loss=kto"),
        (
            ["trainer.preference.loss=kto", "trainer.preference.rejected_image=blank"],
            "it needs pairs, and kto has none",
        ),
        (["trainer.preference.reference=none"], "loss=dpo needs a reference model"),
        (["trainer.preference.loss=simpo", "trainer.preference.reference=copy"], "uses no reference model"),
        ([*WHOLE, "trainer.preference.reference=adapter"], "trains more than adapters; choose cached"),
        (["trainer.preference.reference=copy", "trainer.deepspeed=zero3"], "choose cached"),
        (["trainer.objective=generation"], "it is for trainer.objective=preference"),
        (["trainer.keep_best=recall@1"], "no evaluation measures it"),
    ],
)
def test_what_contradicts_preferences_is_refused(words: list[str], problem: str, common: list[str], pairs: list[str]):
    if "generation" in words[0]:
        words = [*words, "trainer.preference.beta=0.3"]
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        check_config(compose_config("preference-smol", [*common, *pairs, *WORDS, *words]))


FIGURES: dict[str, dict[str, Any]] = {
    "preference-llava": {
        "trainer.max_steps": 2672, "trainer.learning_rate.language_model_learning_rate": 5e-7,
        "trainer.warmup_steps": 0.05, "trainer.weight_decay.language_model_weight_decay": 0.01,
        "dataset.image_mode": "pad", "trainer.lr_scheduler_type": "cosine", "trainer.preference.beta": 0.1,
    },
    "preference-llava-lora": {
        "trainer.max_steps": 2672, "trainer.learning_rate.language_model_learning_rate": 1e-5,
        "trainer.lora.language_model.r": 128, "trainer.unfreeze.train_connector": False,
    },
    "preference-llava-onevision": {
        "trainer.num_train_epochs": 1, "trainer.gradient_accumulation_steps": 8, "trainer.warmup_steps": 0.1,
        "trainer.learning_rate.visual_encoder_learning_rate": 5e-7, "trainer.unfreeze.train_vision_model": True,
    },
}  # fmt: skip
"""Run -> the figures of the published script."""


@pytest.mark.parametrize("name", FIGURES)
def test_a_run_has_the_figures_of_its_script_and_passes_the_checks(name: str, pairs: list[str]):
    config = compose_config(name, pairs)
    check_config(config)
    assert {key: get_value(config, key) for key in FIGURES[name]} == FIGURES[name]
    assert config.trainer.per_device_train_batch_size == 1
    text = resources.files("vlm.config").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    assert "\n# Differs: " in text[: text.index("defaults:")]


@pytest.mark.slow
def test_all_references_say_the_same(train: Train, pairs: list[str], tmp_path: Path):
    words = [*pairs, *WORDS, "trainer.lora.dropout=0"]
    kinds = ("adapter", "cached", "copy")
    runs = {
        kind: train("preference-smol", tmp_path / kind, *words, f"trainer.preference.reference={kind}")
        for kind in kinds
    }
    for key in ("loss", "kl", "margin", "eval_loss", "eval_kl"):
        found = {kind: logged(folder, key) for kind, folder in runs.items()}
        assert found["cached"] == pytest.approx(found["adapter"], abs=2e-6)
        assert found["copy"] == pytest.approx(found["adapter"], abs=2e-6)
    assert not (runs["adapter"] / "references").exists()
    auto = train("preference-smol", tmp_path / "auto", *words)
    assert losses(auto) == losses(runs["adapter"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge", "apo_zero", "simpo", "orpo"])
def test_every_loss_trains(train: Train, pairs: list[str], tmp_path: Path, loss: str):
    words = [
        f"trainer.preference.loss={loss}",
        "trainer.preference.beta=null",
        "trainer.preference.supervised_weight=0.5",
    ]
    if loss == "robust":
        words.append("trainer.preference.label_smoothing=0.1")
    folder = train(
        "preference-smol", tmp_path / "run", *pairs, *WORDS, *words, "trainer.preference.rejected_image=blank"
    )
    margins = logged(folder, "margin")
    assert margins[-1] > margins[0]
    assert bool(logged(folder, "kl")) == (loss not in ("simpo", "orpo"))


@pytest.mark.slow
def test_single_replies_are_learned_with_kto(train: Train, world: Path, tmp_path: Path):
    words = [*write_preferences(world, tmp_path / "replies.json", labelled=True), *WORDS, *WHOLE]
    folder = train("preference-smol", tmp_path / "run", *words, "trainer.preference.loss=kto")
    assert losses(folder)[0] == pytest.approx(0.5, abs=1e-5)
    assert losses(folder)[-1] < 0.5
    assert not logged(folder, "margin"), "there are no pairs"
    assert len(logged(folder, "eval_kl")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_the_mean_is_over_the_pairs_of_a_step(train: Train, pairs: list[str], tmp_path: Path, loss: str):
    """18 pairs in steps of 10: the last step of an epoch has 8, in micro-batches of 5 and 3."""
    words = [
        *pairs, *WORDS, *WHOLE, f"trainer.preference.loss={loss}", "trainer.preference.supervised_weight=0.3",
        "trainer.train_sampling_strategy=sequential",
    ]  # fmt: skip
    split = ["trainer.per_device_train_batch_size=5", "trainer.gradient_accumulation_steps=2"]
    parts = train("preference-smol", tmp_path / "parts", *words, *split)
    whole = train("preference-smol", tmp_path / "whole", *words, "trainer.per_device_train_batch_size=10")
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert logged(parts, "margin") == pytest.approx(logged(whole, "margin"), abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_stopped(train: Train, pairs: list[str], tmp_path: Path):
    cache = tmp_path / "cache"
    words = [
        *pairs,
        *WORDS,
        *WHOLE,
        "trainer.save_strategy=steps",
        "trainer.save_steps=2",
        f"dataset.cache_dir={cache}",
    ]
    whole = train("preference-smol", tmp_path / "whole", *words)
    for name in ("found", "lost"):
        train("preference-smol", tmp_path / name, *words, "trainer.max_steps=2")
    shutil.rmtree(cache / reference.FOLDER)
    resumed = train("preference-smol", tmp_path / "found", *words)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert logged(resumed, "kl")[-2:] == logged(whole, "kl")[-2:]
    shutil.rmtree(cache / reference.FOLDER)  # the resumed run has put it there again
    shutil.rmtree(tmp_path / "lost" / reference.FOLDER)
    with pytest.raises(ValueError, match="the model has since been trained"):
        train("preference-smol", tmp_path / "lost", *words)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava-onevision", "qwen2.5-vl", "gemma3"])
def test_families_learn_preferences(train_whole: Train, pairs: list[str], tmp_path: Path, family: str):
    save_family(family, tmp_path / "model")
    words = [
        *pairs, *WORDS, "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false",
        "trainer.deepspeed=null", "dataset.max_length=600", "dataset.template=null", "trainer.max_steps=2",
        "trainer.learning_rate.visual_encoder_learning_rate=1e-3", "trainer.preference.rejected_image=cropped",
    ]  # fmt: skip
    folder = train_whole("preference-llava-onevision", tmp_path / "model", tmp_path / "run", *words)
    found = losses(folder)
    assert found[0] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(found[1] - found[0]) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ("deepspeed=zero2", WHOLE), ("deepspeed=zero3", WHOLE), ("deepspeed=zero3", []), ("deepspeed=null", []),
        ("sharding=fsdp2", WHOLE), ("deepspeed=zero2", [*WHOLE, "trainer.preference.loss=kto"]),
    ],
)  # fmt: skip
def test_two_ranks_reach_the_single_process(
    train: Train, common: list[str], pairs: list[str], tmp_path: Path, ranks: str, words: list[str]
):
    """With `kto` too, whose reference point is a mean over ranks; each pair counts as two replies."""
    words = [
        *pairs, *WORDS, *words, "trainer.lora.dropout=0", "trainer.train_sampling_strategy=sequential",
        "trainer.max_grad_norm=0", "trainer.per_device_train_batch_size=6", f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    single = train("preference-smol", tmp_path / "single", *words)
    shutil.rmtree(tmp_path / "cache" / reference.FOLDER, ignore_errors=True)
    two = tmp_path / "two"
    launch(["-cn", "preference-smol", *common, *words, f"trainer.output_dir={two}", f"trainer.{ranks}",
            "trainer.per_device_train_batch_size=3"])  # fmt: skip
    for key in ("loss", "margin", "kl", "eval_loss", "eval_reward_accuracy"):
        assert logged(two, key) == pytest.approx(logged(single, key), abs=5e-4)
