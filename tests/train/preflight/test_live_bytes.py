"""Bytes of live tensors are those of their storages, each once, for as long as something refers to it."""

import torch

from vlm.train.preflight.live_bytes import LiveBytes


def test_storages_count_once_and_while_they_live():
    weight = torch.ones(10)
    with LiveBytes([weight]) as live:
        first = weight * 2  # 40 bytes
        view = first[:5]
        second = first + 1  # 40 more
        assert live.now == live.peak == 80
        del first, second
        assert live.now == 40  # the view keeps its storage
        weight.mul_(2)
        del view
    assert (live.now, live.peak) == (0, 80)


def test_what_the_backward_pass_needs_counts():
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes([weight]) as live:
        (weight.exp() * 3).sum().backward()
    assert live.peak >= 3 * 400  # the exponential is kept, its gradient and the weight's come
    assert live.now == 400
