"""Verdicts as texts, and what a proof found besides that it holds."""

import pytest

from vlm.assembly.family_trial.verdicts import State, Verdict, describe_unused, read_unused, shorten_reason
from vlm.families.proved import Proved

FORMS = ("model.layers.*.indexer.", "model.gate")


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict(State.PROVED), "proved"),
        (Verdict(State.PROVED, "no encoder: by design"), "proved: no encoder: by design"),
        (Verdict(State.NOT_MADE, "no disk"), "not made: no disk"),
    ],
)
def test_a_verdict_reads_as_it_was_written(verdict: Verdict, text: str):
    assert str(verdict) == text
    assert Verdict.parse(text) == verdict


def test_what_no_reply_depends_on_is_read_from_verdicts():
    found = {"parts": Verdict(State.PROVED), "gradients": Verdict(State.PROVED, describe_unused(FORMS))}
    assert read_unused(found) == FORMS
    assert read_unused({"parts": Verdict(State.PROVED, "no encoder"), "gradients": Verdict(State.PROVED)}) == ()
    assert read_unused({"gradients": Verdict(State.FAILED, describe_unused(FORMS))}) == ()
    assert describe_unused(()) == ""


def test_a_proof_that_found_something_is_proved_all_the_same():
    verdicts = {"parts": "proved", "gradients": str(Verdict(State.PROVED, describe_unused(FORMS)))}
    assert Proved(types={"x": verdicts}).summarise("x") == "all"
    assert Proved(types={"x": {**verdicts, "saving": "failed: lost"}}).summarise("x") == "all but saving"


def test_reasons_are_one_line():
    assert shorten_reason("a\n b") == "a b"
