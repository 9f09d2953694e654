"""Tiny families on trial, and the check that a proof fails."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING

from tests.families.tiny_families import TINY
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.table import PROOFS, make_proof
from vlm.assembly.family_trial.verdicts import State
from vlm.families.processing import FamilyProcessor
from vlm.families.table import FAMILIES


def make_subject(name: str = "llava-interleave", *, change: Callable[[Any], None] | None = None) -> Any:
    """A row of `TINY` on trial as it is, with its native processor changed by `change`."""
    made = TINY[name]
    native = made.processor()
    config = CONFIG_MAPPING[made.model_type](**made.config(native))
    if change is not None:
        change(native)
    return Subject(config, FamilyProcessor(native, FAMILIES[made.model_type]))


def check_fails(proof: str, subject: Any, reason: str) -> None:
    """A proof must fail, and say why."""
    verdict = make_proof(PROOFS[proof], subject)
    assert verdict.state is State.FAILED, verdict
    assert reason in verdict.reason, verdict


def check_proved(proof: str, subject: Any) -> None:
    """A proof must be made."""
    assert str(make_proof(PROOFS[proof], subject)) == "proved"
