"""Numbers for comparisons."""

import torch

from vlm.assembly.numbers import bound_infinite


def test_infinite_numbers_are_the_largest_of_their_precision():
    logits = torch.tensor([1.5, torch.inf, -torch.inf, torch.nan], dtype=torch.float16)
    bounded = bound_infinite(logits)
    assert bounded.dtype == torch.float64
    assert bounded[:3].tolist() == [1.5, 65504, -65504]
    assert bounded[3].isnan()
    assert float((bounded - bounded)[:3].norm()) == 0
