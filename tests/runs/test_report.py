"""The page of a run: complete, bounded, without the network, whatever strangers wrote into its directory."""

import json
import os
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.runs.directories import logged, write_run, write_samples
from vlm.cli import report as cli
from vlm.runs import report
from vlm.runs.html import ImageBudget, embed_image
from vlm.runs.read import read_run
from vlm.runs.report import make_report, try_to_write_report, write_report
from vlm.runs.report_outcomes import group_reason
from vlm.runs.report_parts import repeat

VOID = ("meta", "img", "input", "br", "line", "circle", "polyline")
EVIL = '<script>alert(1)</script><img src="http://elsewhere/x.png">'


class Page(HTMLParser):
    """Tags and attributes of a page; every tag that is opened has to be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> Page:
    """A page that loads nothing and runs nothing."""
    page = Page(text)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#"))
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with everything that a directory can have, its texts a stranger's."""
    lines = [*logged([3.0, 2.0, 1.5]), {"step": 30, "eval_exact_match": 0.5}, {"step": 30, "grad_norm/connector": 1.0}]
    lines[0]["loss"] = None
    folder = write_run(tmp_path / "run", lines, settings={"dataset.template": EVIL, "trainer.hub_token": "hush12345"})
    write_samples(folder, 10, [EVIL])
    write_samples(folder, 30, [EVIL, "a plain answer"])
    part = {"name": "connector", "source": EVIL, "parameters": 1000, "trained": 10, "how": "LoRA r=4",
            "learning_rate": 1e-3, "weight_decay": 0.0}  # fmt: skip
    source = {"source": EVIL, "records": 9, "samples": 8, "images": 8, "tokens": 1234, "skipped": 1, "truncated": 0,
              "fingerprint": "0123456789abcdef"}  # fmt: skip
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    files = {
        "parts.json": {"parts": [part]},
        "data.json": {"train": {"samples": 8, "skipped": 1, "sources": [source]}, "eval": {"samples": 3}},
        "versions.json": {
            "python": "3.11",
            "git": "abc123",
            "git_changes": True,
            "packages": {"torch": "2", "x": None},
        },
        "speed.json": {"tokens_per_second": 123.4, "mfu": 0.25, "peak": {"source": EVIL, "tflops": 1.0}},
        "scores.json": {"test": {"label": {"records": 8, "note": EVIL, "scores": {"f1": score}, "baseline": {}}}},
        "eval/val/results.json": {"records": 8, "metrics": {"rouge": score, EVIL: score}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "scores" / "test").mkdir(parents=True)
    Image.new("RGB", (50, 50), "blue").save(folder / "scores" / "test" / "roc.png")
    skipped = [{"id": f"r{n}", "reason": f"image file /data/{n}.png does not exist", "file": f"/data/{n}.png"}
               for n in range(3)]  # fmt: skip
    (folder / "skipped.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*skipped, {"reason": EVIL}]))
    change = {"step": 10, "time": "t", "changes": {"trainer.seed": [1, EVIL]}}
    (folder / "changes.jsonl").write_text(f"{json.dumps(change)}\n")
    (folder / "guard.jsonl").write_text('{"step": 7}\n{"torn')
    return folder


def test_the_page_tells_everything_and_nothing_on_it_is_alive(run: Path):
    text = write_report(run).read_text()
    check_page(text)
    for shown in (
        "LoRA r=4: 10", "0123456789ab", "1,234", "0.5 [0.4, 0.6]", "a plain answer", "image file … does not exist",
        "git checkout abc123\nvlm -cn finetune-smol", "learning rate", "whole model", "123.4",
        "loss was infinite or undefined 1 times", "A guard found something", "0.5 ± 0.2", "from step",
    ):  # fmt: skip
        assert shown in text, shown
    assert "hush12345" not in text
    assert text.count("data:image/") == 3
    assert "&lt;script&gt;" in text


def test_commands_are_shown_as_they_are_typed(run: Path):
    (run / "command.txt").write_text(
        "/opt/my-env/bin/python3.12 /opt/my-env/bin/vlm -cn pretrain-smol 'a=b c'\n"
        "/usr/bin/python -u -m vlm -cn x\npython train.py vlm\n/opt/python /home/me/vlm/train.py\n"
    )
    page = repeat(read_run(run))
    assert "<pre>git checkout abc123\nvlm -cn pretrain-smol &#x27;a=b c&#x27;</pre>" in page
    assert "<pre>vlm -cn x\npython train.py vlm\n/opt/python /home/me/vlm/train.py</pre>" in page
    assert "3 later starts, which" in page
    (run / "command.txt").write_text("python -m vlm -cn x\n" * 2)
    assert "1 later start, which resumed it" in repeat(read_run(run))


def test_the_peak_memory_is_the_same_everywhere(run: Path):
    """That of the whole run, and not that of the last log before it."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "loss": 1.0, "peak_memory_gib": 0.9581}) + "\n")
    assert "0.9581 GiB" in make_report(read_run(run))
    (run / "speed.json").write_text(json.dumps({"peak_memory_gib": 0.97851}))
    page = make_report(read_run(run))
    assert "0.9785 GiB" in page
    assert "0.958" not in page
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": 0.0}
    (run / "run.lock.json").write_text(json.dumps(holder))  # the run writes its page before it ends
    assert "0.9785 GiB" in write_report(run, "done").read_text()


def test_the_configuration_is_that_of_the_last_start(run: Path):
    changes = [("trainer.num_train_epochs", 2.0, 3.5), ("trainer.num_train_epochs", 3.5, 4.25), ("code.vlm", "a", "b")]
    lines = [{"step": 10, "time": "t", "changes": {key: [old, new]}} for key, old, new in changes]
    (run / "changes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = repeat(read_run(run))
    assert "num_train_epochs: 4.25" in page
    assert "connector_learning_rate: 0.001" in page
    assert "Configuration of the last start" in page
    (run / "changes.jsonl").unlink()
    assert "num_train_epochs: 2.0" in repeat(read_run(run))


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.md", "data.json", "scores.json", "parts.json"]
)
def test_a_damaged_file_costs_its_section_alone(run: Path, name: str):
    (run / name).write_bytes(b'\xff\x00{"a": [[[\n- x: : y\n')
    text = write_report(run).read_text()
    check_page(text)
    if name != "samples.md":
        assert f"{name} is damaged and was left out" in text


def test_values_of_other_types_are_no_reason_to_fail(run: Path):
    for name in ("parts.json", "data.json", "versions.json", "speed.json", "scores.json", "eval/val/results.json"):
        for content in ({"parts": 5}, {"parts": [3]}, {"train": [1]}, {"test": {"label": 3}}, {"metrics": {"a": []}},
                        {"packages": "x", "devices": 4}, {"train": {"sources": [1, {"source": None}]}}):  # fmt: skip
            (run / name).write_text(json.dumps(content))
            check_page(write_report(run).read_text())


def test_an_empty_directory_has_a_page_too(tmp_path: Path):
    check_page(write_report(tmp_path).read_text())


def test_the_state_that_a_run_ends_with_is_shown(run: Path):
    (run / "status.json").write_text('{"state": "failed", "message": "the disk is full"}')
    assert "The run failed at step 30: the disk is full" in write_report(run, "failed").read_text()
    (run / "status.json").write_text('{"state": "training"}')
    assert "at step 30: its process ended without a word" in write_report(run, "failed").read_text()
    assert "The run did not finish" in write_report(run, "stopped").read_text()


def test_a_page_stays_small(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "MAX_IMAGE_BYTES", 900)
    lines = [{"step": step, "loss": 1 / (1 + step), "eval_loss": 1.0, "grad_norm": 2.0} for step in range(5000)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "skipped.jsonl").write_text("".join(f'{{"reason": "reason {"ab" * n}"}}\n' for n in range(2000)))
    text = write_report(run).read_text()
    assert len(text) < 1_000_000
    assert "images were left out" in text


def test_a_failure_of_the_page_is_logged_and_not_raised(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(report, "make_report", lambda run: 1 / 0)
    assert try_to_write_report(run) is None
    assert "report.html could not be written" in caplog.text


def test_what_is_no_image_is_not_embedded(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"GIF89a nonsense")
    assert embed_image(tmp_path / "a.png") == ""
    assert embed_image(tmp_path / "b.png") == ""
    Image.new("RGB", (300, 200)).save(tmp_path / "c.png")
    assert ImageBudget(10).embed(tmp_path / "c.png") == ""
    assert embed_image(tmp_path / "c.png", 64).startswith("data:image/jpeg;base64,")


def test_reasons_are_grouped_without_what_is_of_one_record():
    assert group_reason("image file /a/b 1.png does not exist", "/a/b 1.png") == "image file … does not exist"
    assert group_reason("512 tokens are more than 256") == group_reason("1,024 tokens are more than 256")


def test_the_command_writes_pages_of_older_runs(run: Path, capsys: pytest.CaptureFixture[str]):
    cli.main([str(run), str(run / "final")])
    assert capsys.readouterr().out.splitlines() == [str(run / "report.html")] * 2
