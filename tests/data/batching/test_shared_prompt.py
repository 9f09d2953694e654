"""Conversations with the same prompt become one sample, whose branches have exactly the ids of each of them."""

from typing import Any

import pytest
import torch

from vlm.data.batching.packing import BRANCHES, Branches
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.dataset import LOSS_WEIGHTS
from vlm.data.encoding.labels import IGNORE_INDEX

IMAGE = 9
PIXELS = torch.ones(1, 3, 2, 2)


def side(prompt: list[int], reply: list[int], **inputs: Any) -> dict[str, Any]:
    """A prompt with a supervised reply."""
    return {"input_ids": prompt + reply, "labels": [IGNORE_INDEX] * len(prompt) + reply, **inputs}


def merge(*sides: dict[str, Any]) -> Any:
    return BranchMerger([IMAGE], ["kinds"]).merge(sides)


def test_branches_have_the_ids_and_labels_of_their_conversations():
    sides = [side([5, 9, 6, 7], reply, pixel_values=PIXELS.clone()) for reply in ([1, 2], [3], [4, 4, 4])]
    merged = merge(*sides)
    assert merged[BRANCHES] == Branches(3, (3, 2, 4))
    assert merged["pixel_values"] is sides[0]["pixel_values"]
    for name in ("input_ids", "labels"):
        start, branches = merged[name][:3], torch.tensor(merged[name][3:]).split(merged[BRANCHES].lengths)
        assert [[*start, *branch.tolist()] for branch in branches] == [one[name] for one in sides]


def test_the_last_common_token_is_in_each_branch_where_its_reply_is_predicted():
    merged = merge(side([5, 6], [1]), side([5, 6], [2]))
    assert merged["input_ids"] == [5, 6, 1, 6, 2]
    assert merged["labels"] == [IGNORE_INDEX, IGNORE_INDEX, 1, IGNORE_INDEX, 2]


def test_tokens_that_replies_have_in_common_are_not_shared():
    assert merge(side([5, 6, 7], [1, 2]), side([5, 6, 7], [1, 3]))[BRANCHES].shared == 2


def test_ids_that_differ_at_the_border_are_not_shared():
    """The first token of a reply may swallow the end of the prompt."""
    merged = merge(side([5, 6, 7, 8], [1]), side([5, 6, 7], [3, 1]))
    assert merged[BRANCHES].shared == 2
    assert merged["input_ids"] == [5, 6, 7, 8, 1, 7, 3, 1]


def test_values_of_tokens_and_weights_follow():
    def with_values(reply: list[int], kind: int) -> dict[str, Any]:
        kinds = torch.tensor([0, 0, *[kind] * len(reply)])
        return side([5, 6], reply, kinds=kinds, **{LOSS_WEIGHTS: torch.ones(len(kinds)) * 1.0})

    merged = merge(with_values([1, 1], 2), with_values([2], 3))
    assert merged["kinds"].tolist() == [0, 0, 2, 2, 0, 3]
    assert len(merged[LOSS_WEIGHTS]) == 6


@pytest.mark.parametrize(
    "other",
    [
        side([4, 6, 7], [2]),  # another prompt
        side([5, 6, 7], [2], pixel_values=PIXELS),  # an image
        side([5], [6, 7, 2]),  # only the token in front of the reply is common
        side([5, 6, 7], [2], kinds=torch.zeros(4)),
    ],
)
def test_conversations_that_share_no_prompt_stay_apart(other: dict[str, Any]):
    assert merge(side([5, 6, 7], [1]), other) is None


def test_images_have_to_be_equal_and_in_the_prompt():
    def with_image(prompt: list[int], reply: list[int], value: float = 1.0) -> dict[str, Any]:
        return side(prompt, reply, pixel_values=PIXELS * value)

    assert merge(with_image([5, 9, 6], [1]), with_image([5, 9, 6], [2])) is not None
    assert merge(with_image([5, 9, 6], [1]), with_image([5, 9, 6], [2], 0.5)) is None
    assert merge(with_image([5, 6, 9], [1]), with_image([5, 6, 9], [2])) is None  # its last token is in each branch
    assert merge(with_image([5, 6, 7], [1, 9]), with_image([5, 6, 7], [2, 9])) is None
    kinds = [torch.zeros(4), torch.tensor([0, 1, 0, 0])]
    assert merge(*(side([5, 6, 7], [1], kinds=kind) for kind in kinds)) is None


def test_one_conversation_has_nothing_to_share():
    assert merge(side([5, 6, 7], [1])) is None
