"""Proofs about rows: each fails where a token sees what it must not, and passes where only another one is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from tests.families.tiny_families import UNPACKED


def leak(subject: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Let the language model's last hidden states `(B, T, D)` be changed."""
    subject.model.get_decoder().norm.register_forward_hook(lambda module, inputs, output: change(output))
    return subject


def add_mean_of_row(hidden: torch.Tensor) -> torch.Tensor:
    """Let each token see the whole row."""
    return hidden + hidden.mean(1, keepdim=True)


def add_tokens_before(hidden: torch.Tensor) -> torch.Tensor:
    """Let each token see all tokens before it, whatever sample they are of, and none that is in a cache only."""
    return hidden + hidden.cumsum(1)


def add_mean_of_batch(hidden: torch.Tensor) -> torch.Tensor:
    """Let each row see the others."""
    return hidden + hidden.mean(0, keepdim=True)


def test_a_model_that_sees_later_tokens_is_found():
    check_fails("causal", leak(make_subject(), add_mean_of_row), "its tokens attend to later tokens")


def test_a_model_that_sees_padding_or_other_rows_is_found():
    check_fails("batch", leak(make_subject(), add_mean_of_row), "in a padded batch")
    check_fails("batch", leak(make_subject(), add_mean_of_batch), "in a padded batch")


def test_images_of_another_row_are_found():
    check_proved("batch", make_subject())
    subject = make_subject()
    subject.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: output.flip(0))
    check_fails("batch", subject, "in a padded batch, the logits of sample 1 differ")


def test_samples_of_a_packed_row_that_see_each_other_are_found():
    subject = leak(make_subject(), add_tokens_before)
    check_proved("causal", subject)
    check_proved("batch", subject)
    check_fails("packing", subject, "in a packed row, the logits of sample 2 differ")


def test_replies_behind_a_shared_prompt_that_see_each_other_are_found():
    check_proved("pairs", make_subject())
    check_fails(
        "pairs", leak(make_subject(), add_tokens_before), "behind a shared prompt, the logits of sample 2 differ"
    )


def test_generation_that_forgets_is_found():
    subject = make_subject()
    check_proved("generation", subject)
    check_fails("generation", leak(subject, add_tokens_before), "that generate writes is not the likeliest")


@pytest.mark.parametrize("name", UNPACKED)
def test_families_whose_masks_join_samples_cannot_be_packed(name: str):
    check_fails("packing", make_subject(name), "")
    check_fails("pairs", make_subject(name), "")
