"""Sizes in configurations: whole numbers, none larger than the weights; sizes of images are bounded."""

from pathlib import Path

import pytest

from vlm.checks.checkpoint_files import TensorHeader
from vlm.checks.checkpoint_numbers import check_numbers, check_processor_numbers

FILE = Path("config.json")
HEADERS = {f"layers.{number}.weight": TensorHeader("F32", (10, 10)) for number in range(4)}


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 2}, {"depths": [1, 2]}, {"hidden_size": None}, {"max_position_embeddings": 10**7},
        {"recipe": {"hidden_size": "x"}}, {"num_local_experts": 0}, {"image_size": [24, 24]},
        {"hidden_size": {"a": "b"}},
    ],
)  # fmt: skip
def test_sizes_that_fit_the_weights_pass(values: dict):
    check_numbers(FILE, {"text_config": values}, HEADERS)
    check_numbers(FILE, values, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 5), ("num_hidden_layers", -1), ("hidden_size", 10**6), ("hidden_size", 0),
        ("vocab_size", "many"), ("num_attention_heads", 1.5), ("num_attention_heads", True), ("depths", [1, [10**9]]),
        ("image_size", 10**9), ("patch_size", 0), ("num_key_value_heads", 0), ("n_layer", 10**12),
    ],
)  # fmt: skip
def test_sizes_that_no_model_of_these_weights_has_are_refused_by_key(key: str, value: object):
    with pytest.raises(ValueError, match=rf"^config.json: text_config.{key}=.*; a whole number from "):
        check_numbers(FILE, {"text_config": {key: value}}, HEADERS)


def test_without_weights_sizes_have_a_bound_too():
    with pytest.raises(ValueError, match=r"num_hidden_layers=1000000000; a whole number from 0 to 4,096 is needed$"):
        check_numbers(FILE, {"num_hidden_layers": 10**9}, None)


def test_sizes_of_images_are_bounded():
    check_processor_numbers(FILE, {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, "patch_size": 14})
    check_processor_numbers(FILE, {"image_processor": {"crop_size": {"height": 336, "width": 336}}})
    for value in (10**9, 0, -1, "large", 1.5):
        with pytest.raises(ValueError, match=r"config.json: image_processor.size.height=.*; a whole number from 1 to"):
            check_processor_numbers(FILE, {"image_processor": {"size": {"height": value}}})
