"""What would go wrong is said with the override that mends it."""

from dataclasses import replace
from typing import Any

from vlm.config.schema import RunConfig
from vlm.train.preflight.findings import DataFindings, DiskFindings, Findings
from vlm.train.preflight.problems import find_problems


def problems(config: RunConfig, findings: Findings, **changes: Any) -> list[tuple[str, str, bool]]:
    """The problems of findings with changes."""
    found = find_problems(config, replace(findings, **changes))
    return [(problem.text, problem.remedy, problem.is_fatal) for problem in found]


def test_a_run_that_works_has_none(config: RunConfig, findings: Findings):
    assert problems(config, findings) == []


def test_too_little_memory_and_disk_are_fatal(config: RunConfig, findings: Findings):
    assert findings.memory is not None
    ((text, remedy, fatal),) = problems(config, findings, memory=replace(findings.memory, available=1000))
    assert "a device has 1.0 kB" in text
    assert "trainer.per_device_train_batch_size=4 with trainer.gradient_accumulation_steps=2" in remedy
    assert fatal
    ((text, remedy, fatal),) = problems(config, findings, disk=DiskFindings(10, 10, 3000, 2000))
    assert text == "checkpoints and final need 3.0 kB, and 2.0 kB are free"
    assert "trainer.save_total_limit=1" in remedy


def test_records_that_are_left_out_and_short_runs_are_told(config: RunConfig, findings: Findings):
    data = DataFindings(lengths=[10] * 10, skipped=[("too many tokens", 5)])
    ((text, remedy, fatal),) = problems(config, findings, data=data)
    assert text == "5 records are left out, 5 of them because: too many tokens"
    assert (remedy, fatal) == ("dataset.max_length=…", False)
    assert findings.duration is not None
    rare = replace(config, trainer=replace(config.trainer, logging_steps=50))
    ((text, remedy, _),) = problems(rare, findings)
    assert "the run has 9 steps and logs every 50" in text
    assert remedy == "trainer.logging_steps=1"


def test_a_step_without_effect_is_told_where_there_are_few(config: RunConfig, findings: Findings):
    assert findings.duration is not None
    rates = {"connector": [(0, 0.0), (1, 1e-3), (2, 5e-4)]}
    short = replace(findings.duration, steps=3)
    ((text, remedy, fatal),) = problems(config, findings, duration=short, rates=rates)
    assert text == "the rates warm up from 0, so the first of 3 steps changes nothing"
    assert (remedy, fatal) == ("trainer.warmup_steps=0", False)
    assert problems(config, findings, duration=replace(short, steps=300), rates=rates) == []
    constant = {"connector": [(0, 1e-3), (1, 1e-3), (2, 5e-4)]}
    assert problems(config, findings, duration=short, rates=constant) == []
