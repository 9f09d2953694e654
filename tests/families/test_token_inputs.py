"""Inputs for each token: the maker that a processor needs is the one that agrees with the processor's own call."""

import torch
from transformers.models.qwen2_vl import Qwen2VLProcessor

from tests.families.tiny_families import mllama, qwen
from vlm.families.token_inputs import CrossAttentionMask, ImageMarks, TokenTypes, find_maker, mark_replies

IDS = [5, 9, 9, 7]


def test_types_and_marks():
    native = qwen(Qwen2VLProcessor)
    image, video = native.image_token_id, native.video_token_id
    assert TokenTypes(native)([1, image, video], [], {}).tolist() == [0, 1, 2]
    assert ImageMarks(9)(IDS, [], {}).tolist() == [0, 1, 1, 0]
    assert mark_replies(IDS, [-100, -100, 9, 7], {}).tolist() == [0, 0, 1, 1]
    assert mark_replies(IDS, [-100] * 4, {}).tolist() == [0] * 4


def test_the_maker_is_the_one_that_agrees():
    native = qwen(Qwen2VLProcessor)
    image = native.image_token_id
    ids = [image, 4, image]
    types = torch.tensor([1, 0, 1])
    assert find_maker(native, "types", types, ids, {}, image) == TokenTypes(native)
    native.image_token_ids = [4]
    assert find_maker(native, "marks", types.bool(), ids, {}, image) == ImageMarks(image)
    assert find_maker(native, "positions", torch.tensor([3, 2, 1]), ids, {}, image) is None


def test_tiles_are_attended_to_from_their_image_on():
    native = mllama()
    tiles = {"aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]])}
    image = native.image_token_id
    mask = CrossAttentionMask(image, 4)([3, image, 4], [], tiles)
    assert mask.shape == (3, 1, 4)
    assert mask[:, 0].tolist() == [[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0]]
    assert find_maker(native, "cross_attention_mask", mask, [3, image, 4], tiles, image) is not None
    assert find_maker(native, "cross_attention_mask", mask, [3, image, 4], {}, image) is None
