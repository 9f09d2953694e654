"""The proof about labels: it fails where anything but the replies and their ends is supervised, or ids are others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from tests.families.tiny_families import TURN
from vlm.data.encoding import labels
from vlm.data.encoding.labels import IGNORE_INDEX, Rendered
from vlm.data.processor import Processor
from vlm.data.sample import Sample

THINKING = TURN.replace(
    "{{ c['text'] }}",
    "{% if m['role'] == 'assistant' %}{{ c['text'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ c['text'] }}"
    "{% endif %}",
)
"""A template that drops what a reply thinks."""


def set_template(template: str) -> Any:
    """Return what gives a native processor another template."""

    def change(native: Any) -> None:
        native.chat_template = native.tokenizer.chat_template = template

    return change


@pytest.mark.parametrize("name", ["llava-interleave", "llava-1.5", "paligemma", "phi4-multimodal", "smolvlm"])
def test_labels_of_each_form_of_template_are_proved(name: str):
    check_proved("labels", make_subject(name))


def test_labels_of_a_thinking_template_are_proved():
    check_proved("labels", make_subject(change=set_template(THINKING)))


def test_a_template_that_hides_the_end_of_a_reply_is_found():
    hidden = TURN.replace("<|end|>\n", "{% if m['role'] == 'user' %}<|end|>\n{% else %}. {% endif %}")
    assert hidden != TURN
    check_fails("labels", make_subject(change=set_template(hidden)), "which is no special token of the tokenizer")


def test_an_end_that_is_not_supervised_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labels, "reply_end", lambda processor, text, end: end)
    check_fails("labels", make_subject(), "is supervised for the reply 'A red fox' and what ends it")


def test_more_than_the_end_of_a_reply_is_found(monkeypatch: pytest.MonkeyPatch):
    real = labels.reply_end
    monkeypatch.setattr(
        labels, "reply_end", lambda processor, text, end: min(real(processor, text, end) + 8, len(text))
    )
    check_fails("labels", make_subject(), "behind the reply")


def test_questions_that_are_supervised_are_found():
    def label_all(processor: Processor, rendered: Rendered, ids: Sequence[int], spans: object) -> list[int]:
        return list(ids)

    subject = make_subject()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels.encode, "__defaults__", ((), label_all, labels.render))
        check_fails("labels", subject, "is supervised for the reply")


def test_labels_of_other_ids_are_found():
    def shift(processor: Processor, rendered: Rendered, ids: Sequence[int], spans: Any) -> list[int]:
        kept = labels.label_replies(processor, rendered, ids, spans)
        return [label if label == IGNORE_INDEX else label + 1 for label in kept]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels.encode, "__defaults__", ((), shift, labels.render))
        check_fails("labels", make_subject(), "where the id is another")


def test_a_reply_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch):
    real = labels.render

    def render_last(*args: Any, **options: Any) -> Rendered:
        rendered = real(*args, **options)
        return Rendered(rendered.text, rendered.spoken, rendered.replies[-1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels.encode, "__defaults__", ((), labels.label_replies, render_last))
        check_fails("labels", make_subject(), "2 replies make 1 supervised runs")


def test_other_ids_than_the_familys_own_are_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    real = subject.processor.tokenize

    def tokenize(text: str, *args: Any) -> Any:
        ids, spans = real(text, *args)
        return [*ids[:1], *ids], [(0, 0), *spans]

    monkeypatch.setattr(subject.processor, "tokenize", tokenize)
    check_fails("labels", subject, "ids differ from the family's own from place 1 on")


def test_a_token_that_a_user_spells_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    real = subject.processor.tokenize
    monkeypatch.setattr(subject.processor, "tokenize", lambda text, spoken, sizes: real(text, (), sizes))
    subject.processor.image_token = "<|turn|>"  # a token that the count of images does not refuse already
    check_fails("labels", make_spelling(subject), "makes it a special token")


def make_spelling(subject: Any) -> Any:
    """Return a subject whose image token is its own again, and which takes no heed of what users spell."""
    subject.processor.image_token = "<image>"
    subject.processor.media_tokens = ["<image>"]
    real = subject.processor._get_expansions
    subject.processor._get_expansions = lambda tokens, sizes: real(tokens[: len(sizes)], sizes) + tokens[len(sizes) :]
    return subject


def test_thinking_that_swallows_the_answer_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject(change=set_template(THINKING))
    real = labels.render_whole_turns

    def render_short(processor: Processor, sample: Sample, *, keep: bool) -> Rendered:
        rendered = real(processor, sample, keep=keep)
        return replace(rendered, replies=[(end - 3, end) for _, end in rendered.replies])

    monkeypatch.setattr(labels, "render_whole_turns", render_short)
    check_fails("labels", subject, "of a reply with thinking")
