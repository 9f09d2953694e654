"""Grids of images at native resolution: Qwen2-VL's rule, within bounds whatever the image; patches and their order."""

import math

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vlm.models.native import NativeResolution, cut_patches, join_patches, square_order

SIZES = [(480, 640), (640, 480), (30, 40), (1000, 300), (97, 1013), (2304, 2304), (333, 517), (56, 56), (28, 28)]
"""Heights and widths."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", [1, 2])
def test_sizes_are_those_of_qwen(size: tuple[int, int], multiple: int):
    side, least, most = 14 * multiple, 16, 1280
    native = NativeResolution(14, multiple, multiple, least * multiple**2, most * multiple**2)
    height, width = smart_resize(*size, factor=side, min_pixels=least * side**2, max_pixels=most * side**2)
    assert native.grid(size) == (height // 14, width // 14)
    assert native.image_tokens([size]) == [height * width // side**2]


@pytest.mark.parametrize("least", [1, 4, 60, 64])
def test_every_image_stays_within_the_bounds(least: int):
    native = NativeResolution(16, 2, 2, least * 4, 64 * 4)
    for size in [*SIZES, (1, 1), (1, 5000), (5000, 1), (3, 8000), (10_000, 10_000), (16, 4000)]:
        rows, columns = native.grid(size)
        assert rows % 2 == columns % 2 == 0
        assert 1 <= native.num_tokens((rows, columns)) <= 64
        if max(size) < 10 * min(size):
            assert native.num_tokens((rows, columns)) >= least * 0.8  # whole rows and columns


def test_queries_give_each_image_as_many_tokens():
    native = NativeResolution(16, 1, 1, 4, 256, num_queries=9)
    assert native.image_tokens(SIZES) == [9] * len(SIZES)


def test_patches_are_cut_and_joined():
    images = torch.arange(2 * 3 * 6 * 8).view(2, 3, 6, 8)
    patches = torch.cat([cut_patches(image, 2) for image in images])
    assert patches.shape == (2 * 12, 3, 2, 2)
    assert torch.equal(patches[1], images[0, :, :2, 2:4])
    assert torch.equal(join_patches(patches, (3, 4)), images)


def test_patches_of_a_square_stand_together():
    grids = [(2, 4), (4, 2)]
    assert square_order(grids, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert square_order(grids, 1).tolist() == list(range(sum(map(math.prod, grids))))
