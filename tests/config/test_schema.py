"""The schema knows what `TrainingArguments` takes, from its source."""

from dataclasses import fields
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from tests.fixtures import compose_config
from vlm.config.schema import OUR_DEFAULTS, OWN_TRAINER_FIELDS, TRAINING_ARGUMENT_FIELDS, TrainerConfig, key_names
from vlm.config.training_fields import read_training_argument_choices, read_training_argument_fields

DATA = "dataset.path=data.json"
SHADOWED = {"output_dir", "learning_rate", "weight_decay", "deepspeed", "resume_from_checkpoint"}
"""Keys of ours that stand in place of a field of `TrainingArguments`."""


def test_fields_are_those_of_training_arguments():
    own = {field.name for field in fields(TrainingArguments)}
    assert own == set(read_training_argument_fields())


def test_literal_defaults_are_those_of_training_arguments():
    expected = {field.name: field.default for field in fields(TrainingArguments)}
    for name, (_, default) in read_training_argument_fields().items():
        if default is not None:
            assert default == expected[name], name


def test_enumerations_are_those_of_training_arguments():
    choices = read_training_argument_choices()
    assert choices["lr_scheduler_type"] == [one.value for one in SchedulerType]
    assert "adamw_torch_fused" in choices["optim"]


def test_every_field_is_a_key_of_the_trainer():
    names = {field.name for field in fields(TrainerConfig)}
    assert names == set(read_training_argument_fields()) | OWN_TRAINER_FIELDS
    assert set(read_training_argument_fields()) - set(TRAINING_ARGUMENT_FIELDS) == SHADOWED & set(
        read_training_argument_fields()
    )


def test_our_defaults_are_keys_that_pass_through():
    assert set(OUR_DEFAULTS) <= set(TRAINING_ARGUMENT_FIELDS)
    trainer: Any = compose_config("pretrain-smol", [DATA]).trainer
    assert {name: getattr(trainer, name) for name in OUR_DEFAULTS} == OUR_DEFAULTS


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("adam_beta2=0.95", 0.95),
        ("max_steps=3", 3),
        ("report_to=[tensorboard,wandb]", ["tensorboard", "wandb"]),
        ("lr_scheduler_kwargs={num_cycles: 2}", {"num_cycles": 2}),
        ("dataloader_prefetch_factor=null", None),
        ("optim=adamw_torch", "adamw_torch"),
        ("eval_strategy=epoch", "epoch"),
    ],
)
def test_any_field_is_set_without_a_plus(override: str, value: Any):
    trainer = compose_config("pretrain-smol", [DATA, f"trainer.{override}"]).trainer
    assert getattr(trainer, override.split("=")[0]) == value


def test_key_names_follow_the_tree():
    assert key_names("") == ["model", "trainer", "dataset", "inference"]
    assert key_names("trainer.unfreeze") == ["train_vision_model", "train_connector", "train_language_model"]
    assert key_names("model.connector.options") == []
    assert key_names("no.such") == []
