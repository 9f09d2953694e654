"""Runs of other kinds are inspected too: what cannot be counted is measured, and said."""

from collections.abc import Callable
from pathlib import Path

from tests.fixtures import compose_config, head_words
from tests.train.distillation.distillation_runs import KEY, STUDENT, train_teacher
from tests.train.objectives.preference_runs import WORDS, write_preferences
from vlm.train.preflight.inspect import inspect_run
from vlm.train.preflight.report import as_text


def test_a_run_with_a_head(common: list[str], labelled: Path):
    config = compose_config("head-classification", [*common, *head_words(labelled, "colour")])
    findings = inspect_run(config, "head-classification", [])
    assert findings.memory is not None
    assert findings.memory.note == "it has prediction heads, whose memory is measured alone"
    assert findings.memory.measured > 0
    assert "not predicted: it has prediction heads" in as_text(findings)


def test_a_run_of_preferences(common: list[str], world: Path, tmp_path: Path):
    pairs = write_preferences(world, tmp_path / "pairs.json")
    findings = inspect_run(compose_config("preference-smol", [*common, *pairs, *WORDS]), "preference-smol", [])
    assert findings.duration is not None
    assert findings.memory is not None
    assert findings.memory.measured > 0
    assert str(findings.memory.note).startswith("the replies of a pair are computed together")
    assert findings.memory.predicted is None
    assert findings.first_batch


def test_a_teacher_takes_memory_that_is_measured(common: list[str], train: Callable[..., Path], tmp_path: Path):
    words = [*STUDENT, f"{KEY}.teacher={train_teacher(train, tmp_path)}"]
    findings = inspect_run(compose_config("distil-smol", [*common, *words]), "distil-smol", [])
    assert findings.memory is not None
    assert findings.memory.note == "the teacher takes memory beside the model that trains"
    assert (findings.memory.predicted, findings.memory.worst) == (None, None)
    assert findings.memory.measured > 0
