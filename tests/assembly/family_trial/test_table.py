"""The trial as a whole: every family of the table passes it, and what cannot be made is told from what fails."""

import pytest

from tests.assembly.family_trial.subjects import make_subject
from tests.families.tiny_families import TINY, UNPACKED
from vlm.assembly.family_trial import table
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.table import PROOFS, make_proof, make_proofs, try_family
from vlm.assembly.family_trial.verdicts import DisprovedError, NotProvableError, State, Verdict


@pytest.mark.parametrize("name", TINY)
def test_every_family_passes(name: str):
    subject = make_subject(name)
    verdicts = try_family(subject.config, subject.processor)
    assert list(verdicts) == list(PROOFS)
    for proof in ("packing", "pairs"):
        assert verdicts.pop(proof).state is (State.FAILED if name in UNPACKED else State.PROVED)
    assert set(map(str, verdicts.values())) == {"proved"}, verdicts


def test_a_model_that_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()

    def shrink(*args: object) -> None:
        raise ValueError("widths do not fit")

    monkeypatch.setattr(table, "shrink", shrink)
    verdicts = try_family(subject.config, subject.processor)
    assert {verdict.state for verdict in verdicts.values()} == {State.NOT_MADE}
    assert "no small model of it" in verdicts["parts"].reason


def test_no_proof_begins_behind_the_deadline():
    verdicts = dict(make_proofs(make_subject(), deadline=0))
    assert list(verdicts) == list(PROOFS)
    assert all("took too long" in verdict.reason for verdict in verdicts.values())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DisprovedError("it is\nwrong"), "failed: it is wrong"),
        (NotProvableError("nobody knows"), "not made: nobody knows"),
        (KeyError("pixels"), "not made: KeyError: 'pixels'"),
    ],
)
def test_a_verdict_says_what_came_of_a_proof(error: Exception, told: str):
    def prove(subject: Subject) -> None:
        raise error

    verdict = make_proof(prove, make_subject())
    assert str(verdict) == told
    assert Verdict.parse(told) == verdict


def test_a_long_reason_is_cut():
    def prove(subject: Subject) -> None:
        raise DisprovedError("x" * 10_000)

    assert len(make_proof(prove, make_subject()).reason) <= 400
