"""The search on processors that are a line of arithmetic each: what it finds is the highest that fits."""

import pytest

from vlm.assembly.token_budget import BudgetError, BudgetSearch, Size, changed_options
from vlm.models.pixels import Settings


def areas(settings: Settings, size: Size) -> int | None:
    """Tokens of 10 x 10 pixels, as Qwen's: the sides are rounded, an area bounds them."""
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    height, width = (max(round(side / 10), 1) for side in size)
    scale = min(1.0, (most / 100 / (height * width)) ** 0.5)
    rows, columns = max(int(height * scale), 1), max(int(width * scale), 1)
    if rows * columns * 100 < least:
        grow = (least / 100 / (rows * columns)) ** 0.5
        rows, columns = -int(-rows * grow // 1), -int(-columns * grow // 1)
    return rows * columns


def tiles(settings: Settings, size: Size) -> int | None:
    """Tokens of 256 a tile, and of a view of the whole, as LFM2-VL's; refused without any tile."""
    if settings["max_tiles"] < settings["min_tiles"]:
        return None
    number = min(size[0] * size[1] // 512**2, settings["max_tiles"]) if settings["do_image_splitting"] else 1
    return settings["max_image_tokens"] + (number * 256 if number > 1 else 0)


def few_values(settings: Settings, size: Size) -> int | None:
    """Tokens of a number that has to be one of a few, as Gemma 4's."""
    return settings["max_soft_tokens"] if settings["max_soft_tokens"] in (70, 140, 280) else None


def grids(settings: Settings, size: Size) -> int | None:
    """Tokens of the largest grid."""
    return max(rows * columns for rows, columns in settings["grids"])


AREAS = {"size": {"shortest_edge": 400, "longest_edge": 1_000_000}, "patch_size": 5, "merge_size": 2}
TILES = {"max_tiles": 10, "min_tiles": 2, "do_image_splitting": True, "max_image_tokens": 256, "do_resize": True}


def test_settings_that_fit_stay_the_same_object():
    assert BudgetSearch(AREAS, areas, 10_000).run() is AREAS


def test_an_area_is_as_many_squares_as_the_budget_has():
    found = BudgetSearch(AREAS, areas, 300).run()
    assert changed_options(AREAS, found) == {"size.longest_edge": (1_000_000, 30_000)}
    assert AREAS["size"] == {"shortest_edge": 400, "longest_edge": 1_000_000}


def test_a_lower_limit_gives_way_no_further_than_it_has_to():
    found = BudgetSearch(AREAS, areas, 3).run()
    assert 0 < found["size"]["shortest_edge"] < 400
    assert max(areas(found, (side, side)) or 0 for side in range(1, 2000)) <= 3


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2600, {"max_tiles": 9}),
        (1000, {"max_tiles": 2}),
        (256, {"max_tiles": 1, "min_tiles": 1}),
        (300, {"max_tiles": 1, "min_tiles": 1}),
        (100, {"do_image_splitting": False, "max_image_tokens": 100}),
    ],
)
def test_tiles_become_fewer_then_none_then_the_view_smaller(budget: int, expected: dict[str, object]):
    assert BudgetSearch(TILES, tiles, budget).run() == {**TILES, **expected}


def test_an_option_of_a_few_values_gets_one_of_them():
    found = BudgetSearch({"max_soft_tokens": 280}, few_values, 200).run()
    assert found == {"max_soft_tokens": 140}
    with pytest.raises(BudgetError) as raised:
        BudgetSearch({"max_soft_tokens": 280}, few_values, 69).run()
    assert raised.value.least == 70


def test_the_largest_grids_are_left_out_and_the_others_keep_their_order():
    listed = {"grids": [[4, 2], [2, 4], [2, 2], [6, 6]]}
    assert BudgetSearch(listed, grids, 8).run() == {"grids": [[4, 2], [2, 4], [2, 2]]}
    with pytest.raises(BudgetError, match="4 tokens"):
        BudgetSearch(listed, grids, 3).run()


def test_a_shape_that_only_the_last_look_finds_is_kept_within_the_budget_too():
    """Of one ratio of sides, which is none of the few, an image takes twice as many tokens."""

    def odd(settings: Settings, size: Size) -> int | None:
        twice = 10_000 in size and 7.2 < max(size) / min(size) < 7.8
        return settings["max_patches"] * (2 if twice else 1)

    assert BudgetSearch({"max_patches": 40}, odd, 30).run() == {"max_patches": 15}
