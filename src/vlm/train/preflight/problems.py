"""What would go wrong with a run, or is likely not meant, each with the override that mends it."""

from collections.abc import Iterator

from vlm.checks.disk import format_bytes
from vlm.config.schema import RunConfig
from vlm.train.guards.memory import list_remedies
from vlm.train.preflight.findings import Findings, Problem

MANY_LEFT_OUT = 0.02
"""Share of the records that may be left out without a word."""
FEW_STEPS = 5
"""With so few steps or fewer, one that changes nothing is worth a word."""


def find_problems(config: RunConfig, findings: Findings) -> Iterator[Problem]:
    """Yield problems, the worst first."""
    yield from _memory_problems(config, findings)
    yield from _disk_problems(findings)
    yield from _data_problems(findings)
    yield from _step_problems(config, findings)


def _memory_problems(config: RunConfig, findings: Findings) -> Iterator[Problem]:
    memory = findings.memory
    if memory is None:
        return
    if memory.needed > memory.available:
        fits = [row.override for row in memory.rows if min(row.device.values()) < memory.available]
        text = (
            f"the largest step needs {format_bytes(memory.needed)}, and a device has {format_bytes(memory.available)}"
        )
        yield Problem(text, "; ".join([*list_remedies(config)[:3], *fits[:1]]), is_fatal=True)


def _disk_problems(findings: Findings) -> Iterator[Problem]:
    disk = findings.disk
    if disk is not None and disk.needed > disk.free:
        text = f"checkpoints and final need {format_bytes(disk.needed)}, and {format_bytes(disk.free)} are free"
        yield Problem(text, "trainer.save_total_limit=1, or trainer.output_dir=… on another disk", is_fatal=True)


def _data_problems(findings: Findings) -> Iterator[Problem]:
    data = findings.data
    for form in data.forms:
        if "they look like" in form:
            yield Problem(form, "dataset.format=…, if they are read wrongly (vlm data show)")
    left_out = sum(number for _, number in data.skipped)
    if left_out > MANY_LEFT_OUT * (len(data.lengths) + left_out):
        reason, number = data.skipped[0]
        text = f"{left_out:,} records are left out, {number:,} of them because: {reason}"
        longer = "dataset.max_length=…" if "token" in reason else "vlm data clean"
        yield Problem(text, longer)


def _step_problems(config: RunConfig, findings: Findings) -> Iterator[Problem]:
    if findings.duration is None:
        return
    steps, trainer = findings.duration.steps, config.trainer
    if steps < trainer.logging_steps:
        text = f"the run has {steps} steps and logs every {trainer.logging_steps:g}: its plots would be empty"
        yield Problem(text, f"trainer.logging_steps={max(steps // 10, 1)}")
    firsts = [points[0][1] for points in findings.rates.values() if points]
    if steps <= FEW_STEPS and firsts and not any(firsts):
        text = f"the rates warm up from 0, so the first of {steps} steps changes nothing"
        yield Problem(text, "trainer.warmup_steps=0")
    peak = {name: max(rate for _, rate in points) for name, points in findings.rates.items() if points}
    for name, points in findings.rates.items():
        if points and points[-1][0] > 1 and peak[name] == points[-1][1] and points[0][1] == 0:
            yield Problem(
                f"the learning rate of {name} only warms up: it is at its peak at the last step",
                "trainer.warmup_steps=0.03, a share of the steps",
            )
            return
