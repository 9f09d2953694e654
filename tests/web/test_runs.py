"""Runs as the page finds and reads them: without a browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vlm.runs.charts import Curve, draw_figure
from vlm.web.html import status_html
from vlm.web.runs import (
    checkpoints,
    find_run,
    find_runs,
    has_heads,
    last_metrics,
    last_samples,
    log_tail,
    loss_curves,
    read_metrics,
    render_terminal_text,
)


def write_run(folder: Path, *lines: dict, final: str | None = None, config: str = "") -> Path:
    """A run directory as a run on the command line leaves it."""
    folder.mkdir(parents=True)
    (folder / "command.txt").write_text("vlm -cn pretrain-smol\n")
    (folder / "config.yaml").write_text(config or "trainer: {max_steps: -1, num_train_epochs: 2}\n")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if final is not None:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text(json.dumps({"model_type": final}))
    return folder


def test_runs_are_read_from_their_directories(tmp_path: Path):
    logged = [{"step": 5, "loss": 2.0, "epoch": 0.5}, {"step": 10, "loss": None, "epoch": 1.0}]
    write_run(tmp_path / "demo" / "half", *logged)
    write_run(tmp_path / "done", {"step": 3, "loss": 1.5}, final="vlm")
    write_run(tmp_path / "head", final="vlm_prediction")
    (tmp_path / "data").mkdir()
    found = {run.name: run for run in find_runs(tmp_path)}
    assert found.keys() == {"demo/half", "done", "head"}
    half = found["demo/half"]
    assert (half.state, half.step, half.loss, half.progress) == ("not finished", 10, 2.0, 0.5)
    assert (found["done"].state, found["done"].progress) == ("finished", 1.0)
    assert checkpoints(tmp_path, heads=False) == [str(tmp_path / "done" / "final")]
    assert checkpoints(tmp_path, ["owner/name"], heads=True) == ["owner/name", str(tmp_path / "head" / "final")]
    assert has_heads("owner/name") is None


def test_no_folder_beside_the_runs_is_read(tmp_path: Path):
    write_run(tmp_path / "secret")
    write_run(tmp_path / "outputs" / "run")
    assert find_run(tmp_path / "outputs", "../secret") is None
    assert find_run(tmp_path / "outputs", None) is None
    assert find_run(tmp_path / "outputs", "run") is not None
    assert find_runs(tmp_path / "nothing") == []


def test_progress_is_of_the_steps_where_they_are_given(tmp_path: Path):
    write_run(tmp_path / "run", {"step": 5, "epoch": 0.1}, config="trainer: {max_steps: 20, num_train_epochs: 3}\n")
    assert find_run(tmp_path, "run").progress == 0.25


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    write_run(tmp_path / "run", {"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    expected = [Curve("training", [(1, 2.0)]), Curve("evaluation", [(2, 1.0)], marked=True)]
    assert loss_curves(read_metrics(tmp_path / "run")) == expected


def test_of_a_long_run_the_end_is_read_and_a_plot_has_not_every_point(tmp_path: Path):
    lines = [{"step": step, "loss": step / 2, "epoch": 2 * step / 5000} for step in range(1, 5001)]
    folder = write_run(tmp_path / "run", *lines)
    run = find_run(tmp_path, "run")
    assert (run.step, run.loss, run.progress) == (5000, 2500.0, 1.0)
    assert len(last_metrics(folder)) < 5000
    curves = loss_curves(read_metrics(folder))
    assert (curves[0].name, curves[0].points[-1]) == ("training", (5000, 2500.0))
    drawn = re.search(r'<polyline points="([^"]*)"', draw_figure("Loss", curves))
    assert drawn is not None
    places = [float(point.split(",")[0]) for point in drawn[1].split()]
    assert 100 < len(places) <= 1000
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("  0%|  | 0/9\r 50%|# | 4/9\r100%|##| 9/9\ndone\n", "100%|##| 9/9\ndone\n"),
        ("half\r\nwhole", "half\nwhole"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07and\x00 bell\x07", "red and bell"),
        ("left\r", "left"),
    ],
)
def test_logs_read_as_on_a_terminal(written: str, shown: str):
    assert render_terminal_text(written) == shown


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d \xff\n" % number for number in range(50_000)))
    lines = log_tail(tmp_path / "log").splitlines()
    assert len(lines) == 200
    assert lines[-1].startswith("line 49999")


def test_the_last_samples_are_shown(tmp_path: Path):
    (tmp_path / "samples.md").write_text(
        "## Step 1\n\n- **question**: old?\n- **reference**: a\n- **answer**: b\n\n## Step 20\n\n"
        "![sample 0](samples/0.png)\n\n- **question**: what?\n- **reference**: red\n- **answer**: <b>blue</b>\n\n"
        "- **question**: no image?\n- **reference**: x\n- **answer**: ![](http://elsewhere/x.png)\n\n"
    )
    title, samples = last_samples(tmp_path)
    assert title == "Step 20"
    assert [sample["question"] for sample in samples] == ["what?", "no image?"]
    assert samples[0]["image"] == str(tmp_path / "samples" / "0.png")
    assert "image" not in samples[1]
    assert last_samples(tmp_path / "nowhere") == ("", [])


def test_the_view_escapes_what_a_run_wrote(tmp_path: Path):
    gradio = pytest.importorskip("gradio")
    from vlm.web.run_view import RunView

    folder = write_run(tmp_path / "run", {"step": 1, "loss": 2.0})
    (folder / "samples.md").write_text("## Step 1\n\n- **question**: <script>x</script>\n- **answer**: <img src=x>\n")
    with gradio.Blocks(analytics_enabled=False):
        view = RunView(tmp_path)
    assert view.refresh("run")[0] == "run"
    page = "".join(value for value in view.refresh("run") if isinstance(value, str))
    assert "<script>" not in page
    assert "&lt;img src=x&gt;" in page
    assert view.refresh("../run")[0] is None


def test_an_active_run_says_what_it_is_doing(tmp_path: Path):
    folder = write_run(tmp_path / "run", {"step": 5, "loss": 2.0, "epoch": 1.0})
    run = find_run(tmp_path, "run")
    assert run is not None
    assert "left" not in status_html(run)
    status = {"state": "training", "step": 5, "seconds_left": 320, "tokens_per_second": 1234.5,
              "memory_bytes": 3 * 2**30, "waiting_share": 0.25}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    shown = status_html(replace(run, state="running"))
    for text in ("training", "5 min 20 s left", "1,234 tokens/s", "3.0 GiB", "25% waiting for data"):
        assert text in shown
    (folder / "status.json").write_text(json.dumps({**status, "state": "starting", "seconds_left": None}))
    assert "loading model and data" in status_html(replace(run, state="running"))
    (folder / "status.json").write_text(json.dumps({"state": "<b>x</b>"}))
    assert "<b>" not in status_html(replace(run, state="running"))
    (folder / "status.json").write_text("{torn")
    assert "running" in status_html(replace(run, state="running"))
