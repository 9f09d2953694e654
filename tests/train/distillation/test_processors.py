"""Vocabularies that fit and that do not, and processors that make the same inputs."""

import copy

import pytest

from tests.tiny_parts import Parts
from vlm.train.distillation.processors import check_same_vocabulary, have_same_inputs


def test_equal_processors_make_the_same_inputs(parts: Parts):
    processor = parts.processor("clip", "llama", template="chatml")
    assert have_same_inputs(processor, parts.processor("clip", "llama", template="chatml"))
    assert not have_same_inputs(processor, parts.processor("clip", "llama", template="plain"))
    assert not have_same_inputs(processor, parts.processor("dinov2", "llama", template="chatml"))


def test_batches_that_a_tokenizer_made_do_not_matter(parts: Parts):
    processor = parts.processor("clip", "llama", template="chatml")
    other = copy.deepcopy(processor)
    other.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=8)
    assert have_same_inputs(processor, other)


def test_further_tokens_are_allowed(parts: Parts):
    processor = parts.processor("clip", "llama", template="chatml")
    longer = copy.deepcopy(processor)
    longer.tokenizer.add_tokens(["<box>"])
    check_same_vocabulary(processor, longer, "x")
    check_same_vocabulary(longer, processor, "x")


def test_another_order_is_refused(parts: Parts):
    processor = parts.processor("clip", "llama", template="chatml")
    other = parts.processor("clip", "vicuna", template="v1")
    with pytest.raises(ValueError, match=r"x: its vocabulary differs: id \d+ is '.*'; *|Choose a teacher") as e:
        check_same_vocabulary(processor, other, "x")
    assert "Choose a teacher whose tokens have the same ids" in str(e.value)


def test_two_tokens_that_change_places_are_found(parts: Parts):
    processor = parts.processor("clip", "llama", template="chatml")
    first, second = copy.deepcopy(processor), copy.deepcopy(processor)
    first.tokenizer.add_tokens(["<a>", "<b>"])
    second.tokenizer.add_tokens(["<b>", "<a>"])
    with pytest.raises(ValueError, match=r"is '<b>', and '<a>' in the model that trains \(2 of"):
        check_same_vocabulary(first, second, "x")
