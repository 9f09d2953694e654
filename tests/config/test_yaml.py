"""Every shipped YAML composes into the schema; the recipes hold the figures they are named after."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import vlm.config
from tests.fixtures import compose_config
from vlm.checks.fields import check_fields
from vlm.cli.overview import overview
from vlm.config.choices import GROUP_BY_MODALITY_LENGTH
from vlm.config.derived import get_value
from vlm.config.packaged import group_names, packaged_connectors, packaged_names, run_names
from vlm.config.schema import RunConfig
from vlm.models.connectors import CONNECTORS, connector_options

FOLDER = Path(vlm.config.__file__).parent
DATA = "dataset.path=data.json"
OPTIONS = [(group, option) for group in group_names() for option in packaged_names("vlm.config", group, ".yaml")]

CLIP_VICUNA = {
    "model.visual_encoder.hf_name": "openai/clip-vit-large-patch14-336",
    "model.visual_encoder.feature_layer": -2,
    "model.visual_encoder.feature_strategy": "patch",
    "model.language_model.hf_name": "lmsys/vicuna-7b-v1.5",
    "model.connector.type": "mlp",
}
BOTH_STAGES = {
    **CLIP_VICUNA,
    "dataset.max_length": 2048,
    "trainer.num_train_epochs": 1.0,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.adam_beta1": 0.9,
    "trainer.adam_beta2": 0.999,
    "trainer.max_grad_norm": 1.0,
    "trainer.lr_scheduler_type": "cosine",
    "trainer.warmup_steps": 0.03,
    "trainer.weight_decay.visual_encoder_weight_decay": 0.0,
    "trainer.weight_decay.connector_weight_decay": 0.0,
    "trainer.weight_decay.language_model_weight_decay": 0.0,
    "trainer.bf16": True,
    "trainer.tf32": True,
    "trainer.activation_checkpointing": True,
    "trainer.loss_average": "micro_batch",
    "trainer.unfreeze.train_vision_model": False,
    "trainer.unfreeze.train_connector": True,
}
RECIPES = {
    "pretrain-llava": {
        **BOTH_STAGES,
        "dataset.template": "plain",
        "dataset.image_mode": "square",
        "trainer.per_device_train_batch_size": 256 // 8,
        "trainer.train_sampling_strategy": "random",
        "trainer.unfreeze.train_language_model": False,
        "trainer.learning_rate.connector_learning_rate": 1e-3,
    },
    "finetune-llava": {
        **BOTH_STAGES,
        "dataset.template": "v1",
        "dataset.image_mode": "pad",
        "trainer.per_device_train_batch_size": 128 // 8,
        "trainer.train_sampling_strategy": GROUP_BY_MODALITY_LENGTH,
        "trainer.unfreeze.train_language_model": True,
        "trainer.learning_rate.connector_learning_rate": 2e-5,
        "trainer.learning_rate.language_model_learning_rate": 2e-5,
    },
}
"""LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744) on 8 GPUs: key -> value."""

ZERO_STAGES = {"pretrain-llava": 2, "finetune-llava": 3}


@pytest.mark.parametrize("run", ["pretrain-llava", "finetune-llava-qlora", "finetune-llava-onevision"])
def test_what_the_tests_compose_is_what_hydra_does(run: str):
    words = [DATA, "trainer/deepspeed=zero2", "trainer.save_steps=7", "++dataset.options.label_key=colour"]
    with initialize_config_module("vlm.config", version_base="1.3"):
        expected = OmegaConf.to_object(compose(run, words))
    assert compose_config(run, words) == expected


@pytest.mark.parametrize("name", run_names())
def test_every_run_composes(name: str):
    config = compose_config(name, [DATA])
    assert isinstance(config, RunConfig)
    check_fields(config)


@pytest.mark.parametrize("name", run_names())
def test_every_run_says_what_it_is_for(name: str):
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")
    assert name in overview()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str):
    check_fields(compose_config("pretrain-smol", [DATA, f"{group}={option}"]))


def test_every_yaml_is_a_run_or_an_option():
    known = {f"{name}.yaml" for name in [*run_names(), "base"]} | {
        f"{group}/{option}.yaml" for group, option in OPTIONS
    }
    assert known == {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*.yaml")}


def test_only_base_configures_hydra():
    loaded = {file: OmegaConf.load(file) for file in FOLDER.rglob("*.yaml")}
    assert [file.name for file, yaml in loaded.items() if isinstance(yaml, DictConfig) and "hydra" in yaml] == [
        "base.yaml"
    ]


def test_the_table_of_connectors_is_the_group():
    ours = {name for name in CONNECTORS if ":" not in name}  # other tests may have added classes of their own
    assert set(packaged_connectors()) == ours == set(packaged_names("vlm.config", "model/connector", ".yaml"))


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connectors_yaml_declares_its_options(name: str):
    parameters = inspect.signature(CONNECTORS[name].__init__).parameters.values()
    assert packaged_connectors()[name] == [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_llavas(name: str):
    config = compose_config(name, [DATA])
    assert {key: get_value(config, key) for key in RECIPES[name]} == RECIPES[name]
    assert config.trainer.deepspeed["zero_optimization"]["stage"] == ZERO_STAGES[name]
    options = connector_options(config.model.connector.type, config.model.connector.options)
    assert {key: options[key] for key in ("num_layers", "activation")} == {"num_layers": 2, "activation": "gelu"}


def test_13b_is_one_override():
    expected: dict[str, Any] = {**RECIPES["pretrain-llava"], "model.language_model.hf_name": "lmsys/vicuna-13b-v1.5"}
    config = compose_config("pretrain-llava", [DATA, "model/language_model=vicuna-13b-v1.5"])
    assert {key: get_value(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", packaged_names("vlm.config", "trainer/deepspeed", ".yaml"))
def test_deepspeed_leaves_the_optimiser_to_the_parts(name: str):
    settings = compose_config("pretrain-smol", [DATA, f"trainer/deepspeed={name}"]).trainer.deepspeed
    assert not {"optimizer", "scheduler"} & set(settings)
    if name != "none":
        assert settings["zero_optimization"]["stage"] == int(name.removeprefix("zero"))
