"""Positions in time, height and width: a row has those that it has alone, whatever rows stand beside it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.assembly.family import load_family_model
from vlm.assembly.small_models.make import make_small
from vlm.families.grid_positions import RowPositions, compute_by_row, count_axes, has_grid_positions
from vlm.families.meta_model import build_meta_model, get_auto_class

GRID = torch.tensor([[1, 4, 4]])
"""An image of 4 x 4 patches, merged to 2 x 2."""
NUM_TOKENS = 8
"""Its placeholders: a token behind each row of patches, a beginning and an end."""
BEFORE, AFTER = 2, 3


@cache
def make_model(model_type: str) -> Any:
    """Return the small model of a type without weights."""
    return build_meta_model(make_small(model_type).config)


def make_rows(num_images: int, *, seen: bool = True) -> dict[str, torch.Tensor]:
    """Return as many equal rows with an image each, which something attends to or not."""
    types = [0] * BEFORE + [1] * NUM_TOKENS + [0] * AFTER
    mask = [1 - kind for kind in types] if not seen else [1] * len(types)
    return {
        "input_ids": torch.ones(num_images, len(types), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([types] * num_images),
        "image_grid_thw": GRID.expand(num_images, 3),
        "attention_mask": torch.tensor([mask] * num_images),
    }


@pytest.fixture
def model() -> Any:
    """A model whose own code counts images over the rows of a batch."""
    made = make_model("hunyuan_vl")
    own = type(made.model).get_rope_index.__get__(made.model)
    made.model.get_rope_index = own
    return made


def test_the_own_code_of_the_model_needs_it(model: Any):
    positions, _ = model.model.get_rope_index(**make_rows(2))
    assert not torch.equal(positions[:, 0], positions[:, 1])
    with pytest.raises(ValueError, match="fewer image placeholder spans"):
        model.model.get_rope_index(**make_rows(1, seen=False))


def test_a_row_has_the_positions_that_it_has_alone(model: Any):
    alone, delta = model.model.get_rope_index(**make_rows(1))
    compute_by_row(model)
    positions, deltas = model.model.get_rope_index(**make_rows(3))
    assert torch.equal(positions, alone.expand(-1, 3, -1))
    assert torch.equal(deltas, delta.expand(3, 1))


def test_an_image_that_nothing_attends_to_takes_no_part(model: Any):
    compute_by_row(model)
    dummy, image = make_rows(1, seen=False), make_rows(1)
    rows = {name: torch.cat([dummy[name], image[name]]) for name in image}
    positions, _ = model.model.get_rope_index(**rows)
    alone, _ = model.model.get_rope_index(**image)
    text = dummy["attention_mask"][0].bool()
    assert positions[:, 0, text].tolist() == [list(range(BEFORE + AFTER))] * count_axes(model)
    assert torch.equal(positions[:, 1:], alone)


@pytest.mark.parametrize("number", [0, 2])
def test_an_image_too_many_or_too_few_is_refused_as_before(model: Any, number: int):
    compute_by_row(model)
    rows = make_rows(1) | {"image_grid_thw": GRID.expand(number, 3)}
    with pytest.raises(ValueError, match="image placeholder spans"):
        model.model.get_rope_index(**rows)


def test_other_models_keep_their_own_code(model: Any):
    compute_by_row(model)
    changed = model.model.get_rope_index
    compute_by_row(model)
    assert model.model.get_rope_index is changed
    for model_type in ("qwen2_5_vl", "llava"):
        other = make_model(model_type)
        compute_by_row(other)
        assert has_grid_positions(other) == (model_type != "llava")
        assert not isinstance(getattr(other.model, "get_rope_index", None), RowPositions)


def test_a_model_that_is_loaded_computes_them_so(tmp_path: Path):
    config = make_small("hunyuan_vl").config
    get_auto_class(config).from_config(config).save_pretrained(tmp_path)
    loaded: Any = load_family_model(str(tmp_path), config, dtype=torch.float32)
    assert isinstance(loaded.model.get_rope_index, RowPositions)


def test_the_axes_are_those_of_the_configuration(model: Any):
    assert count_axes(model) == 4
    assert count_axes(make_model("qwen2_5_vl")) == 3
