"""The schema knows what `TrainingArguments` takes, from its source."""

from dataclasses import fields

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from tests.conftest import config_of
from vlm.config.schema import key_names, training_argument_choices, training_argument_fields


def test_fields_are_those_of_training_arguments():
    own = {field.name for field in fields(TrainingArguments)}
    assert own == set(training_argument_fields())


def test_literal_defaults_are_those_of_training_arguments():
    expected = {field.name: field.default for field in fields(TrainingArguments)}
    for name, (_, default) in training_argument_fields().items():
        if default is not None:
            assert default == expected[name], name


def test_enumerations_are_those_of_training_arguments():
    choices = training_argument_choices()
    assert choices["lr_scheduler_type"] == [one.value for one in SchedulerType]
    assert "adamw_torch_fused" in choices["optim"]


def test_any_field_is_set_without_a_plus():
    config = config_of("pretrain-smol", ["dataset.path=x", "trainer.adam_beta2=0.95", "trainer.max_steps=3"])
    assert vars(config.trainer)["adam_beta2"] == 0.95


def test_key_names_follow_the_tree():
    assert "trainer" in key_names("")
    assert "train_connector" in key_names("trainer.unfreeze")
    assert key_names("model.connector.options") == []
