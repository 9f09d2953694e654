"""Every refusal of adapters and quantised parts: the keys, what was given, what is allowed."""

import json
from pathlib import Path

import pytest

from tests.fixtures import check_config, compose_config
from vlm.checks import lora as lora_problems
from vlm.checks.fields import ConfigError
from vlm.config.derived import BASE_FILE, get_value, training_keys, zero_stage
from vlm.config.packaged import run_names

R = "trainer.lora.language_model.r=8"
RATE = "trainer.learning_rate.language_model_learning_rate=1e-4"
Q = "model.language_model.quantization"
REFUSALS = {
    "whole and adapted": (
        [R, RATE, "trainer.unfreeze.train_language_model=true"],
        "trainer.lora.language_model.r=8 and trainer.unfreeze.train_language_model=true: an adapter needs a frozen "
        "part; choose one (trainer.lora.language_model.r=null, or "
        "trainer.unfreeze.train_language_model=false)",
    ),
    "no rate": (
        [R],
        "trainer.learning_rate.language_model_learning_rate=null: a positive number is needed, because "
        "trainer.lora.language_model.r=8",
    ),
    "rank": (
        ["trainer.lora.language_model.r=0", RATE],
        "trainer.lora.language_model.r=0: at least 1, or null, is needed",
    ),
    "alpha": (
        [R, RATE, "trainer.lora.language_model.alpha=0"],
        "trainer.lora.language_model.alpha=0: at least 1, or null",
    ),
    "alpha alone": (
        ["trainer.lora.connector.alpha=8"],
        "trainer.lora.connector.alpha=8: it has no effect without trainer.lora.connector.r",
    ),
    "targets alone": (
        ["trainer.lora.visual_encoder.target_modules=[q_proj]"],
        "trainer.lora.visual_encoder.target_modules=['q_proj']: it has no effect without trainer.lora.visual_encoder.r",
    ),
    "no targets": (
        [R, RATE, "trainer.lora.language_model.target_modules=[]"],
        "trainer.lora.language_model.target_modules=[]: give the endings of names of layers, or null for all Linear "
        "layers",
    ),
    "dropout": (["trainer.lora.dropout=1"], "trainer.lora.dropout=1.0: a share from 0 to below 1 is needed"),
    "init": (["trainer.lora.init=pissa"], "trainer.lora.init=pissa: allowed are default, gaussian, orthogonal"),
    "bias": (["trainer.lora.bias=some"], "trainer.lora.bias=some: allowed are none, lora_only, all"),
    "odd rank": (
        ["trainer.lora.language_model.r=7", RATE, "trainer.lora.init=orthogonal"],
        "trainer.lora.language_model.r=7: trainer.lora.init=orthogonal needs an even rank",
    ),
    "bits": ([f"{Q}=3bit"], f"{Q}=3bit: allowed are null, 8bit, 4bit"),
    "quantised and whole": (
        [f"{Q}=4bit", "trainer.unfreeze.train_language_model=true", RATE],
        f"{Q}=4bit and trainer.unfreeze.train_language_model=true: a quantised part stays frozen; train an adapter on "
        "it (trainer.lora.language_model.r=…)",
    ),
    "quantised and sharded": (
        [f"{Q}=4bit", R, RATE, "trainer/deepspeed=zero3"],
        f"{Q}=4bit: ZeRO-3 cannot shard quantised weights; choose trainer/deepspeed=zero2",
    ),
    "two kinds": (
        [f"{Q}=4bit", "model.visual_encoder.quantization=8bit"],
        f"model.visual_encoder.quantization=8bit and {Q}=4bit: these must be equal; choose one",
    ),
}
"""Overrides -> how the message begins."""


@pytest.fixture
def records(tmp_path: Path) -> Path:
    (tmp_path / "records.json").write_text("[]")
    return tmp_path / "records.json"


def refused(records: Path, *overrides: str) -> str:
    config = compose_config("pretrain-smol", [f"dataset.path={records}", *overrides])
    with pytest.raises(ConfigError) as error:
        check_config(config)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_the_keys(
    records: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.setattr(lora_problems, "find_spec", lambda *_: object())
    assert refused(records, *overrides).startswith(message)


def test_the_absence_of_bitsandbytes_is_said(records: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora_problems, "find_spec", lambda *_: None)
    said = refused(records, f"{Q}=4bit")
    assert said == f"{Q}=4bit: bitsandbytes is not installed: pip install 'small-vlm[quant]'"


def test_an_adapter_is_merged_before_what_cannot_merge_it(records: Path, tmp_path: Path):
    for name in (BASE_FILE, "config.json"):
        (tmp_path / name).write_text("{}")
    start = f"trainer.from_pretrained={tmp_path}"
    for overrides in (["trainer.deepspeed=zero3"], [f"{Q}=8bit"]):
        assert f"Merge it first: vlm merge-lora {tmp_path} OUT" in refused(records, start, *overrides)
    check_config(compose_config("pretrain-smol", [f"dataset.path={records}", start, "trainer.deepspeed=zero2"]))


@pytest.mark.parametrize("name", run_names())
def test_an_adapter_needs_no_plus_on_any_run(name: str):
    trainer = compose_config(
        name, ["dataset.path=a.json", R, "trainer.lora.language_model.target_modules=[q_proj]"]
    ).trainer
    assert trainer.lora.language_model.r == 8
    assert trainer.lora.language_model.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    "overrides",
    [
        [R, RATE],
        [R, RATE, "trainer.unfreeze.train_connector=false"],
        ["trainer.lora.connector.r=4", "trainer.unfreeze.train_connector=false", "trainer/deepspeed=zero3"],
        ["trainer/lora=llava", RATE, "trainer.lora.use_dora=true", "trainer.lora.init=gaussian"],
        [f"{Q}=8bit", "trainer.deepspeed=zero2"],
    ],
)
def test_what_can_be_run_passes(records: Path, overrides: list[str]):
    check_config(compose_config("pretrain-smol", [f"dataset.path={records}", *overrides]))


def test_adapters_count_among_what_trains():
    trainer = compose_config(
        "pretrain-smol", ["dataset.path=a.json", R, "trainer.unfreeze.train_connector=false"]
    ).trainer
    assert training_keys(trainer) == {"language_model": R}


def test_the_stage_of_zero(tmp_path: Path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    stages = {None: 0, "zero2": 2, str(tmp_path / "own.json"): 3, "no.json": 0}
    assert {value: zero_stage(value) for value in stages} == stages
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3
    assert zero_stage({}) == 0


RECIPES = {
    "finetune-llava-lora": {
        "model.visual_encoder.hf_name": "openai/clip-vit-large-patch14-336",
        "model.language_model.hf_name": "lmsys/vicuna-7b-v1.5",
        "model.language_model.quantization": None,
        "dataset.template": "v1",
        "dataset.image_mode": "pad",
        "trainer.lora.language_model.r": 128,
        "trainer.lora.language_model.alpha": 256,
        "trainer.lora.language_model.target_modules": None,
        "trainer.lora.visual_encoder.r": None,
        "trainer.lora.connector.r": None,
        "trainer.lora.dropout": 0.05,
        "trainer.lora.bias": "none",
        "trainer.learning_rate.language_model_learning_rate": 2e-4,
        "trainer.learning_rate.connector_learning_rate": 2e-5,
        "trainer.unfreeze.train_connector": True,
        "trainer.unfreeze.train_language_model": False,
        "trainer.per_device_train_batch_size": 128 // 8,
    },
    "finetune-caption": {
        "model.visual_encoder.hf_name": "openai/clip-vit-base-patch16",
        "model.language_model.hf_name": "mistralai/Mistral-7B-Instruct-v0.1",
        "dataset.format": "caption",
        "trainer.lora.language_model.target_modules": None,
        "trainer.lora.visual_encoder.r": None,
        "trainer.eval_strategy": "steps",
        "inference.temperature": 0.8,
        "inference.top_p": 0.95,
        "inference.num_beams": 1,
    },
}
RECIPES["finetune-llava-qlora"] = {
    **RECIPES["finetune-llava-lora"],
    "trainer.lora.language_model.r": 64,
    "trainer.lora.language_model.alpha": 16,
    "trainer.learning_rate.language_model_learning_rate": 2e-5,
    "model.language_model.quantization": "4bit",
    "model.visual_encoder.quantization": None,
}
ZERO_STAGES = {"finetune-llava-lora": 3, "finetune-llava-qlora": 2, "finetune-caption": 2}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_hold_their_figures(name: str):
    config = compose_config(name, ["dataset.path=a.json"])
    assert {key: get_value(config, key) for key in RECIPES[name]} == RECIPES[name]
    assert zero_stage(config.trainer.deepspeed) == ZERO_STAGES[name]
