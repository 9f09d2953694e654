"""The page of a preflight: every finding in words, for a terminal and as HTML that escapes what comes from outside."""

import pytest

from vlm.train.preflight.findings import Findings, Problem
from vlm.train.preflight.report import as_html, as_text, format_duration


def test_the_terminal_shows_every_finding(findings: Findings):
    text = as_text(findings)
    titles = ("Starts from", "Parts", "Data", "First sample", "Memory", "Time", "Disk", "Learning rates")
    assert [title for title in (*titles, "What would go wrong") if f"{title}" not in text] == []
    for name in ("zero0", "zero1", "zero2", "zero3", "fsdp2", "zero3 + offload"):
        assert f"\n  {name} " in text
    assert "counted by PyTorch" in text


def test_the_page_has_plots_images_and_no_address(findings: Findings):
    page = as_html(findings)
    assert page.count("data:image/png;base64,") >= 3
    assert "http" not in page.replace("https://www.w3.org", "")
    assert "color-scheme:light dark" in page


def test_what_comes_from_outside_is_escaped():
    hostile = "<script>alert(1)</script>"
    found = Findings(hostile, hostile, problems=[Problem(hostile, hostile, is_fatal=True)])
    assert "<script>" not in as_html(found)
    assert found.is_refused
    assert f"✗ {hostile}\n    → {hostile}" in as_text(found)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (45, "45 s"), (600, "10.0 min"), (5 * 3600, "5.0 h"), (2.5 * 86400, "2.5 days")],
)
def test_times_are_written_as_people_read_them(seconds: float, text: str):
    assert format_duration(seconds) == text
