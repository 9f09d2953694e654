"""The findings of a preflight as one page for a terminal, and as one HTML file."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from textwrap import indent, shorten

from tabulate import tabulate

from vlm.checks.disk import format_bytes
from vlm.config.html_page import html_page
from vlm.config.shown import printable
from vlm.data.pages import STYLE
from vlm.train.preflight.duration import MEAN_BASIS
from vlm.train.preflight.findings import DataFindings, Findings, MemoryFindings, TimeFindings

Table = tuple[Sequence[str], list[Sequence[str]]]
"""The header of a table, and its rows."""
MOSTLY_COMPUTING = 0.9
"""Where a step on the CPU computes for a smaller share of its time, the page says so."""
SHOWN_SAMPLE = 900
"""Characters of the first sample that a terminal shows."""
PAGE_STYLE = (
    "td.fits{color:var(--good)}td.over{color:var(--bad)}.problem{border-left:4px solid var(--bad);"
    "padding-left:.8rem}.memory td,.memory th{white-space:nowrap}.memory td:last-child{white-space:normal}"
)


def format_duration(seconds: float) -> str:
    """Return a time as people read it: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def as_text(findings: Findings) -> str:
    """Return the page for a terminal."""
    memory, duration = findings.memory, findings.duration
    blocks = [("Starts from", findings.start), ("Parts", findings.parts), ("Data", _data_text(findings.data))]
    if findings.first_sample:
        sample = shorten(findings.first_sample, SHOWN_SAMPLE, placeholder=" …")
        blocks.append(("First sample, supervised tokens in 【 】", sample))
    if memory is not None:
        rows = f"\n\n{_plain(memory_table(memory))}" if memory.rows else ""
        blocks.append(("Memory", f"{memory_text(memory)}{rows}"))
    if duration is not None:
        blocks.append(("Time", time_text(duration)))
    if findings.disk is not None:
        blocks.append(("Disk", disk_text(findings)))
    if findings.rates:
        blocks.append(("Learning rates", _plain(rate_table(findings))))
    blocks.append(("What would go wrong", _problem_text(findings)))
    return printable("\n\n".join(f"{title}\n{indent(text, '  ')}" for title, text in blocks if text))


def _plain(table: Table) -> str:
    header, rows = table
    alignment = ("left", *["right"] * (len(header) - 2), "left")
    return tabulate(rows, header, tablefmt="plain", colalign=alignment, disable_numparse=True)


def _data_text(data: DataFindings) -> str:
    lines = [data.table, "", *data.forms]
    if data.lengths:
        ordered = sorted(data.lengths)
        middle, high = ordered[len(ordered) // 2], ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
        lines.append(
            f"tokens per sample: median {middle:,}, 99th percentile {high:,}, longest {ordered[-1]:,} of "
            f"{data.longest:,} allowed"
        )
    lines += [f"left out, {number:,}: {reason}" for reason, number in data.skipped]
    return "\n".join(lines)


def memory_text(memory: MemoryFindings) -> str:
    """Return what was predicted and measured, in sentences."""
    lines, where = [], ""
    if memory.ranks > 1 or memory.way != "none":
        where = f" on each of {memory.ranks} ranks" + (f" with {memory.way}" if memory.way != "none" else "")
    if memory.predicted is not None:
        found = memory.predicted
        held = {
            "weights": found.weights,
            "gradients": found.gradients,
            "optimiser states": found.states,
            "activations": found.activations,
        }
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items())
        lines.append(f"predicted peak of a probe step{where}: {format_bytes(memory.expected_bytes)}")
        whole = f"without sharding {format_bytes(found.peak)}: " if memory.expected_bytes != found.peak else ""
        lines.append(f"  {whole}{parts}")
    if memory.measured:
        lines.append(f"measured in the same step: {format_bytes(memory.measured)} ({memory.method}){_off(memory)}")
    if memory.highest > memory.measured:
        lines.append(f"highest of all ranks: {format_bytes(memory.highest)}")
    if memory.note:
        lines.append(f"not predicted: {memory.note}")
        below = "; the rows below follow from it" if memory.rows else ""
        lines.append(f"the measurement stands in for a prediction, and longer samples need more{below}")
    if memory.worst is not None:
        lines.append(f"predicted with the longest samples in one batch: {format_bytes(memory.needed)}")
    lines.append(f"available{' to each rank' if memory.ranks > 1 else ''}: {format_bytes(memory.available)}")
    return "\n".join(lines)


def _off(memory: MemoryFindings) -> str:
    """Return how far the prediction is off, in words."""
    if memory.predicted is None:
        return ""
    off = memory.expected_bytes / memory.measured - 1
    return f"; the prediction is {abs(off):.1%} too {'high' if off >= 0 else 'low'}"


def memory_table(memory: MemoryFindings) -> Table:
    """Return what each way of sharding makes of the largest step, by the number of devices."""
    numbers = sorted(memory.rows[0].device) if memory.rows else []
    rows: list[Sequence[str]] = []
    for row in memory.rows:
        cells = [_cell(row.device.get(number), row.host.get(number), memory.available) for number in numbers]
        rows.append([row.name, *cells, row.override])
    return ["sharding", *(f"{number} device{'s' * (number > 1)}" for number in numbers), "how"], rows


def _cell(device: int | None, host: int | None, available: int) -> str:
    if device is None:
        return "-"
    beside = f" + {format_bytes(host)} host" if host else ""
    return f"{format_bytes(device)}{beside}{'' if device <= available else ' too much'}"


def time_text(duration: TimeFindings) -> str:
    """Return the time of the run, in sentences."""
    spread = ""
    if (off := duration.total_margin) is not None:
        least, most = format_duration(max(duration.total - off, 0)), format_duration(duration.total + off)
        spread = f" (probably {least} to {most}, if the machine stays as busy as it is now)"
    steps, evaluations = _count(duration.steps, "step"), _count(duration.evaluations, "evaluation")
    checkpoints = _count(duration.checkpoints, "checkpoint")
    answers = ""
    if duration.answers:
        answers = f"; {_count(duration.answers, 'answer')} to samples: {format_duration(duration.answering)}"
    fitted = f"fitted to {duration.timed} timed steps, growing with {duration.basis}"
    if duration.basis == MEAN_BASIS:
        fitted = f"the mean of {duration.timed} timed steps"
    return "\n".join(
        [
            f"{format_duration(duration.total)} in all{spread}",
            f"loading {format_duration(duration.loading)}; {steps} of {format_duration(duration.step)}: "
            f"{format_duration(duration.training)}",
            f"{evaluations}: {format_duration(duration.evaluation)}{answers}; {checkpoints} and final: "
            f"{format_duration(duration.saving)}; plots: {format_duration(duration.drawing)}",
            f"the time of a step is {fitted}",
            *_waiting_lines(duration.computing),
        ]
    )


def _waiting_lines(computing: float | None) -> list[str]:
    """Return a line where steps on the CPU took much longer than they computed."""
    if computing is None or computing >= MOSTLY_COMPUTING:
        return []
    return [f"this process waited for {1 - computing:.0%} of that time: for a free core, for data or for other ranks"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def disk_text(findings: Findings) -> str:
    """Return what checkpoints take, in sentences."""
    disk = findings.disk
    if disk is None:
        return ""
    return (
        f"a checkpoint {format_bytes(disk.checkpoint)}, final {format_bytes(disk.final)}; at most "
        f"{format_bytes(disk.needed)} at once, {format_bytes(disk.free)} are free"
    )


def rate_table(findings: Findings) -> Table:
    """Return the learning rate of each part at the start, at its peak and at the end."""
    rows: list[Sequence[str]] = []
    for name, points in findings.rates.items():
        step, peak = max(points, key=lambda point: point[1])
        rows.append([name, f"{points[0][1]:.3g}", f"{peak:.3g}", f"{step:,}", f"{points[-1][1]:.3g}"])
    return ["part", "first", "peak", "at step", "last"], rows


def _problem_text(findings: Findings) -> str:
    if not findings.problems:
        return "nothing was found"
    lines = []
    for problem in findings.problems:
        lines += [f"{'✗' if problem.is_fatal else '!'} {problem.text}", f"  → {problem.remedy}"]
    return "\n".join(lines)


def as_html(findings: Findings) -> str:
    """Return the page as one HTML file, plots and images in it."""
    memory = findings.memory
    problems = (
        "".join(
            f'<div class="problem"><p>{escape(problem.text)}</p><p><code>{escape(problem.remedy)}</code></p></div>'
            for problem in findings.problems
        )
        or '<p class="good">Nothing was found.</p>'
    )
    sections = [
        ("What would go wrong", problems),
        ("Starts from", f"<p>{escape(findings.start)}</p>"),
        ("Parts", f"<pre>{escape(findings.parts)}</pre>"),
        ("Data", f"<pre>{escape(_data_text(findings.data))}</pre>{_lengths_plot(findings.data)}"),
        ("Memory of each device", "" if memory is None else _memory_html(memory)),
        ("Time", "" if findings.duration is None else _paragraphs(time_text(findings.duration))),
        ("Disk", _paragraphs(disk_text(findings))),
        ("Learning rates", _rates_plot(findings)),
        ("First batch, supervised tokens marked", findings.first_batch),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return html_page(f"Check of {findings.name}", printable(body), style=STYLE + PAGE_STYLE)


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in text.splitlines())


def _memory_html(memory: MemoryFindings) -> str:
    if not memory.rows:
        return _paragraphs(memory_text(memory))
    header, rows = memory_table(memory)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = []
    for name, *cells, how in rows:
        marked = [f'<td class="{"over" if "too much" in cell else "fits"}">{escape(cell)}</td>' for cell in cells]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(marked)}<td><code>{escape(how)}</code></td></tr>")
    return f"{_paragraphs(memory_text(memory))}<table class='memory'><tr>{head}</tr>{''.join(lines)}</table>"


def _lengths_plot(data: DataFindings) -> str:
    """Return a histogram of the lengths as an image."""
    if not data.lengths:
        return ""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(data.lengths, bins=min(50, len(set(data.lengths))))
    if data.longest <= 2 * max(data.lengths):
        axes.axvline(data.longest, color="black", linestyle="--", label=f"dataset.max_length: {data.longest}")
        axes.legend()
    axes.set(xlabel="tokens of a sample", ylabel="samples")
    return _image(figure, "histogram of lengths")


def _rates_plot(findings: Findings) -> str:
    """Return the learning rate of each part over the steps as an image."""
    if not findings.rates:
        return ""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, points in findings.rates.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return _image(figure, "learning rates")


def _image(figure: object, text: str) -> str:
    """Return a figure as an image within a page."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)  # pyright: ignore[reportAttributeAccessIssue] - matplotlib's
    data = base64.b64encode(content.getvalue()).decode()
    return f'<p><img style="height:auto" src="data:image/png;base64,{data}" alt="{text}"></p>'
