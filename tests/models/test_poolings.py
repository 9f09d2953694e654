"""Which hidden states each pooling reads: other tokens hold NaN here, or get no gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlm.models.poolings import EVERY_TOKEN_POOLINGS, POOLINGS, TokenMasks, mean_over_mask, pool_hidden_states

IMAGE, WANTED, ANSWER, PAD = 7, 8, 9, 0

ROWS = [[1, 7, 7, 2, 8], [3, 8, 7], [7, 4, 5, 8, 8, 6]]
"""Prompts of different lengths, each with images and with wanted tokens."""

READ = {
    "last": [[4], [2], [5]],
    "first": [[0], [0], [0]],
    "mean": [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3, 4, 5]],
    "image": [[1, 2], [2], [0]],
    "text": [[0, 3, 4], [0, 1], [1, 2, 3, 4, 5]],
    "token": [[4], [1], [3, 4]],
    "query": [[4], [1], [3, 4]],
}
"""Pooling -> the places in each row that it reads, by hand."""


def make_token_masks(side: str, answers: int) -> tuple[TokenMasks, list[list[int]]]:
    """Marks of the rows with padding on one side and answers behind them; and where each row's tokens stand."""
    longest = max(map(len, ROWS)) + answers
    ids, places = [], []
    for row in ROWS:
        gap = [PAD] * (longest - len(row) - answers)
        whole = [*row, *[ANSWER, IMAGE, WANTED][:answers]]
        ids.append([*gap, *whole] if side == "left" else [*whole, *gap])
        start = len(gap) if side == "left" else 0
        places.append(list(range(start, start + len(row))))
    tokens = torch.tensor(ids)
    prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, stand in zip(prompt_mask, places, strict=True):
        row[stand] = True
    return TokenMasks(prompt_mask, prompt_mask & (tokens == IMAGE), prompt_mask & (tokens == WANTED)), places


def test_every_pooling_is_said_and_tested():
    assert set(READ) | set(EVERY_TOKEN_POOLINGS) == set(POOLINGS)


@pytest.mark.parametrize("pooling", READ)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", [0, 3])
def test_exactly_the_tokens_of_a_pooling_are_read(pooling: str, side: str, answers: int):
    marks, places = make_token_masks(side, answers)
    hidden = torch.randn(*marks.prompt_mask.shape, 4, requires_grad=True)
    found = pool_hidden_states(pooling, hidden, marks)
    read = [[stand[one] for one in chosen] for stand, chosen in zip(places, READ[pooling], strict=True)]
    selected_mask = torch.stack([row[chosen].mean(dim=0) for row, chosen in zip(hidden, read, strict=True)])
    assert torch.allclose(found, selected_mask, atol=1e-6)
    found.sum().backward()
    assert isinstance(hidden.grad, Tensor)
    for gradient, chosen in zip(hidden.grad, read, strict=True):
        assert gradient.abs().sum(dim=1).nonzero()[:, 0].tolist() == chosen
        assert torch.allclose(gradient[chosen], torch.tensor(1 / len(chosen)))


@pytest.mark.parametrize("pooling", READ)
def test_what_stands_at_other_tokens_does_not_matter(pooling: str):
    """Not even NaN, which attention may leave at padding."""
    marks, _ = make_token_masks("left", 2)
    hidden = torch.randn(*marks.prompt_mask.shape, 4)
    spoilt = hidden.masked_fill(~marks.prompt_mask.unsqueeze(-1), torch.nan)
    assert torch.equal(pool_hidden_states(pooling, spoilt, marks), pool_hidden_states(pooling, hidden, marks))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_in_single_precision(pooling: str):
    marks, _ = make_token_masks("right", 0)
    hidden = torch.randn(*marks.prompt_mask.shape, 4, dtype=torch.bfloat16)
    found = pool_hidden_states(pooling, hidden, marks)
    assert found.dtype == torch.float32
    assert found.shape == ((*marks.prompt_mask.shape, 4) if pooling in EVERY_TOKEN_POOLINGS else (len(ROWS), 4))


def test_the_mean_is_taken_in_single_precision():
    """In half precision a mean over many tokens would be off."""
    hidden = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    prompt_mask = torch.ones(1, 4096, dtype=torch.bool)
    assert pool_hidden_states("mean", hidden, TokenMasks(prompt_mask, prompt_mask, prompt_mask)).item() == 1


@pytest.mark.parametrize(
    ("pooling", "missing", "says"),
    [
        ("image", "media_mask", "row 1 has no token to read: it has no image"),
        ("token", "selected_mask", r"row 1 has no token to read: .*model\.head\.token"),
        ("query", "selected_mask", r"row 1 has no token to read: .*config\.suffix"),
        *((pooling, "prompt_mask", "row 1 has no token to read: it is empty") for pooling in ("last", "first", "mean")),
        *((pooling, "prompt_mask", "row 1 has no token to read: it is empty") for pooling in EVERY_TOKEN_POOLINGS),
    ],
)
def test_a_row_without_anything_to_read_is_named(pooling: str, missing: str, says: str):
    marks, _ = make_token_masks("left", 0)
    mask = getattr(marks, missing).clone()
    mask[1] = False
    with pytest.raises(ValueError, match=f"pooling={pooling}: {says}"):
        pool_hidden_states(pooling, torch.randn(*marks.prompt_mask.shape, 4), replace(marks, **{missing: mask}))


def test_a_row_of_images_alone_has_no_text():
    marks, _ = make_token_masks("left", 0)
    with pytest.raises(ValueError, match="pooling=text: row 0 has no token to read: it consists of images only"):
        pool_hidden_states(
            "text", torch.randn(*marks.prompt_mask.shape, 4), replace(marks, media_mask=marks.prompt_mask)
        )


def test_a_mean_over_nothing_is_zero():
    values = torch.randn(2, 3, 4)
    chosen = torch.tensor([[True, False, True], [False] * 3])
    assert torch.allclose(mean_over_mask(values, chosen)[0], values[0, [0, 2]].mean(dim=0))
    assert mean_over_mask(values, chosen)[1].tolist() == [0] * 4


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling=median: allowed are last, mean, image"):
        pool_hidden_states("median", torch.zeros(3, 6, 2), make_token_masks("left", 0)[0])
