"""What values of `trainer` reach beyond a run."""

import pytest

from vlm.config.reach import CLOSED_ARGUMENTS, PLAIN_ARGUMENTS, is_packaged_deepspeed, is_start_word
from vlm.config.schema import TRAINING_ARGUMENT_FIELDS


def test_the_lists_name_fields_of_the_installed_version():
    """Older versions may lack some; a name of none is a slip."""
    assert PLAIN_ARGUMENTS - {"learning_rate", "weight_decay"} <= {*TRAINING_ARGUMENT_FIELDS, "learning_rate"}
    assert CLOSED_ARGUMENTS.keys() <= TRAINING_ARGUMENT_FIELDS.keys()
    assert not PLAIN_ARGUMENTS & CLOSED_ARGUMENTS.keys()


@pytest.mark.parametrize(
    "value",
    ["zero3", {"zero_optimization": {"stage": 2}}, {"bf16": {"enabled": True}, "train_batch_size": "auto"}, False, {}],
)
def test_packaged_settings_with_other_numbers_are_packaged(value: object):
    assert is_packaged_deepspeed(value)


@pytest.mark.parametrize(
    "value",
    [
        "settings.json", "../zero3", "zero3.yaml", 7, ["zero3"], {"zero_optimization": "auto"},
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        {"train_batch_size": "/etc/passwd"}, {"optimizer": {"type": "evil"}}, {"tensorboard": {"output_path": "/x"}},
        {"train_batch_size": ["auto"]},
    ],
)  # fmt: skip
def test_other_settings_are_not(value: object):
    assert not is_packaged_deepspeed(value)


def test_a_folder_is_no_word():
    assert is_start_word("Auto")
    assert not is_start_word("outputs/run/checkpoint-1")
    assert not is_start_word(7)
