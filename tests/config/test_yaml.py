"""Every shipped YAML composes into the schema; the recipes hold the figures they are named after."""

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import vlm.config
from tests.conftest import config_of
from vlm.__main__ import run_names
from vlm.config.check import CHOICES
from vlm.data.formats import FORMATS
from vlm.data.sampling import GROUPED
from vlm.models.configuration_vlm import FEATURE_STRATEGIES
from vlm.models.connectors import CONNECTORS
from vlm.models.processing_vlm import IMAGE_MODES

FOLDER = Path(vlm.config.__file__).parent
DATA = "dataset.path=data.json"
OPTIONS = [
    (str(file.parent.relative_to(FOLDER)), file.stem)
    for group in ("model", "trainer")
    for file in sorted((FOLDER / group).rglob("*.yaml"))
]


@pytest.mark.parametrize("name", run_names())
def test_every_run_composes(name: str):
    config = config_of(name, [DATA])
    assert config.model.language_model.hf_name
    assert config.dataset.path


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str):
    config_of("pretrain-smol", [DATA, f"{group}={option}"])


@pytest.mark.parametrize("name", sorted(CONNECTORS))
def test_a_connectors_yaml_declares_its_options(name: str):
    declared = OmegaConf.load(FOLDER / "model" / "connector" / f"{name}.yaml")
    parameters = inspect.signature(CONNECTORS[name].__init__).parameters.values()
    assert declared.type == name
    assert set(declared.options) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_choices_are_the_tables():
    assert CHOICES["dataset.format"] == tuple(FORMATS)
    assert CHOICES["dataset.image_mode"] == (None, *IMAGE_MODES)
    assert CHOICES["model.visual_encoder.feature_strategy"] == FEATURE_STRATEGIES
    assert GROUPED in CHOICES["trainer.train_sampling_strategy"]


def test_llava_pretrain_recipe():
    config = config_of("pretrain-llava", [DATA])
    trainer = vars(config.trainer)
    assert config.model.visual_encoder.hf_name == "openai/clip-vit-large-patch14-336"
    assert config.model.visual_encoder.feature_layer == -2
    assert config.model.visual_encoder.feature_strategy == "patch"
    assert config.model.language_model.hf_name == "lmsys/vicuna-7b-v1.5"
    assert (config.model.connector.type, config.dataset.template, config.dataset.image_mode) == ("mlp", "plain", "square")
    assert vars(config.trainer.unfreeze) == {
        "train_vision_model": False, "train_connector": True, "train_language_model": False,
    }  # fmt: skip
    assert config.trainer.learning_rate.connector_learning_rate == 1e-3
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] * 8 == 256
    recipe_of_both_stages(config)
    assert config.trainer.deepspeed["zero_optimization"]["stage"] == 2


def test_llava_finetune_recipe():
    config = config_of("finetune-llava", [DATA])
    trainer = vars(config.trainer)
    assert (config.dataset.template, config.dataset.image_mode) == ("v1", "pad")
    assert vars(config.trainer.unfreeze) == {
        "train_vision_model": False, "train_connector": True, "train_language_model": True,
    }  # fmt: skip
    assert config.trainer.learning_rate.connector_learning_rate == 2e-5
    assert config.trainer.learning_rate.language_model_learning_rate == 2e-5
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] * 8 == 128
    assert trainer["train_sampling_strategy"] == GROUPED
    recipe_of_both_stages(config)
    assert config.trainer.deepspeed["zero_optimization"]["stage"] == 3


def recipe_of_both_stages(config):
    """What LLaVA-1.5's two stages share."""
    trainer = vars(config.trainer)
    assert (trainer["bf16"], trainer["tf32"], trainer["activation_checkpointing"]) == (True, True, True)
    assert (trainer["num_train_epochs"], trainer["lr_scheduler_type"], trainer["warmup_steps"]) == (1, "cosine", 0.03)
    assert set(vars(config.trainer.weight_decay).values()) == {0.0}
    assert config.dataset.max_length == 2048
    assert config.trainer.loss_average == "micro_batch"
    assert (trainer["adam_beta1"], trainer["adam_beta2"], trainer["max_grad_norm"]) == (0.9, 0.999, 1.0)


def test_13b_is_one_override():
    config = config_of("pretrain-llava", [DATA, "model/language_model=vicuna-13b-v1.5"])
    assert config.model.language_model.hf_name == "lmsys/vicuna-13b-v1.5"
