"""Differences: how large they are, how large they may be, and in which words they are told."""

import pytest
import torch

from tests.inference.verify.conftest import Served
from vlm.inference.verify.comparison import (
    TOLERANCES,
    compare_stage,
    first_differing_layer,
    largest_difference,
    without_padding,
)


def compare(served: Served, stage: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: str = "float32"):
    result = compare_stage(stage, {"a": {stage: ours}}, {"a": {stage: theirs}}, served.model.processor, dtype)
    assert result is not None
    return result


def test_one_bad_vector_among_many_is_not_averaged_away():
    ours = torch.randn(1000, 8)
    theirs = ours.clone()
    theirs[500] = -theirs[500]
    assert largest_difference(ours, theirs) > 1
    small = torch.cat([ours, torch.full((1, 8), 1e-6)])
    assert largest_difference(small, small + 1e-6) < 1e-5  # a small vector is measured by the others
    assert largest_difference(ours, ours * float("nan")) == float("inf")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_is_allowed_and_a_tenth_is_not(served: Served, dtype: str):
    logits = torch.randn(16, 50)
    rounded = (logits * (1 + TOLERANCES[dtype] / 2)).to(torch.float32)
    assert compare(served, "logits", logits, rounded, dtype).difference is None
    assert compare(served, "logits", logits, logits * 1.1, dtype).difference is not None


def test_a_level_of_a_pixel_is_a_difference(served: Served):
    pixels = torch.randn(2, 3, 24, 24)
    assert compare(served, "pixels", pixels, pixels + 1e-5).difference is None
    one_level = pixels.clone()
    one_level[0, 0, 0, 0] += 1 / 255 / 0.27
    found = compare(served, "pixels", pixels, one_level)
    assert found.difference is not None
    assert found.difference.sentence.startswith("pixels differ by up to 1.0")
    shape = compare(served, "pixels", pixels, pixels[:1]).difference
    assert shape is not None
    assert shape.sentence == "pixels have the shape (1, 3, 24, 24) instead of (2, 3, 24, 24)"


def test_ids_and_their_number(served: Served):
    ids = torch.tensor([20, 21, 22])
    found = compare(served, "ids", ids, torch.tensor([20, 23, 22, 24]))
    assert found.largest == 2
    assert found.difference is not None
    assert "ids differ from token 1 on" in found.difference.sentence
    assert "4 tokens instead of 3" in found.difference.sentence
    number = {"a": {"number of prompt tokens": torch.tensor([5])}}
    told = compare_stage("number of prompt tokens", {"a": {"ids": ids}}, number, served.model.processor, "float32")
    assert told is not None
    assert told.difference is not None
    assert told.difference.sentence == "the prompt has 5 tokens instead of 3"


def test_a_stage_that_the_engine_does_not_give_is_not_compared(served: Served):
    ours = {"a": {"ids": torch.tensor([1]), "logits": torch.ones(1, 2)}}
    assert compare_stage("logits", ours, {"a": {"ids": torch.tensor([1])}}, served.model.processor, "float32") is None
    found = compare_stage("pixels", ours | {"a": {"pixels": torch.ones(1)}}, {"a": {"ids": torch.tensor([1])}},
                          served.model.processor, "float32")  # fmt: skip
    assert found is not None
    assert found.difference is not None
    assert found.difference.sentence == "the engine reads no pixels of an image"


def test_the_first_layer_that_differs():
    ours = {name: torch.randn(4, 8) for name in ("a", "b", "c")}
    theirs = {"c": ours["c"] * 2, "b": ours["b"] * 3, "a": ours["a"]}
    assert first_differing_layer(ours, theirs, "float32") == ("b", pytest.approx(2))
    assert first_differing_layer(ours, {"a": ours["a"]}, "float32") is None
    assert first_differing_layer(ours, {"a": ours["a"][:1]}, "float32") == ("a", float("inf"))


def test_padding_of_tiles_is_taken_off():
    pixels = torch.arange(2 * 3).view(2, 3, 1, 1, 1)
    assert without_padding(pixels, torch.tensor([1, 3])).flatten().tolist() == [0, 3, 4, 5]
    assert without_padding(pixels, torch.tensor([0, 3])).flatten().tolist() == [0, 3, 4, 5]
    assert without_padding(pixels[0], None) is not None
