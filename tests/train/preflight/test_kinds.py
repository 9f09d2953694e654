"""Runs of other kinds are inspected too: what cannot be counted is measured, and said."""

from pathlib import Path

from tests.fixtures import compose_config, head_words
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
    assert findings.first_batch
