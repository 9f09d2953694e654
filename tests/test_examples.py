"""The commands of examples/README.md do what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_forked

PROGRAMS = {"python": ["-c", "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"],
            "vlm": ["-m", "vlm"]}  # fmt: skip
"""A program of the README -> the words that do the same."""
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the README has been run, in order."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").mkdir()
    shutil.copy(EXAMPLES / "make_data.py", folder / "examples")
    blocks = re.findall(r"```sh\n(.*?)```", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) == 4
    for line in lines:
        program, *words = shlex.split(line)
        (done,) = run_forked([*PROGRAMS[program], *words], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    (folder / "answer.txt").write_text(done.stdout.splitlines()[-1])
    return folder


def test_the_data_has_every_kind_of_record(place: Path):
    data = place / "examples" / "data"
    assert len(list((data / "images").iterdir())) == len(json.loads((data / "captions.json").read_text())) == 12
    records = json.loads((data / "train.json").read_text())
    images = [record.get("image") for record in records]
    assert None in images
    assert any(isinstance(image, list) for image in images)
    assert max(len(record["conversations"]) for record in records) == 4


def test_both_stages_leave_a_complete_model_and_what_the_readme_names(place: Path):
    for run in ("example-pretrain", "example-finetune"):
        assert (place / "outputs" / run / "final" / "model.safetensors").is_file()
    run = place / "outputs" / "example-finetune"
    assert "<mark>" in (run / "first_batch.html").read_text()
    assert "**answer**" in (run / "samples.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any({"eval_loss", "eval_blank_loss"} <= line.keys() for line in lines)


def test_every_record_was_used(place: Path):
    for run, count in (("example-pretrain", 12), ("example-finetune", 9)):
        data = json.loads((place / "outputs" / run / "data.json").read_text())
        assert (data["train"]["samples"], data["train"]["skipped"]) == (count, 0)


@pytest.mark.slow
def test_replay_prevents_what_a_finetune_on_one_kind_forgets(tmp_path: Path):
    """Measured: without replay no other answer is right, with a quarter of replay all are; the new ones are in both."""
    command = [sys.executable, str(EXAMPLES / "forgetting.py"), "--output", str(tmp_path), "--shares", "0", "0.25"]
    subprocess.run(command, check=True)
    folder = tmp_path / "learning-rate-0.001-seed-42"
    found = json.loads((folder / "forgetting.json").read_text())
    alone, replayed = (found[share]["changes"] for share in ("0", "0.25"))
    others = [kind for kind in alone if kind != "name"]
    assert len(others) == 4
    for kind in others:
        assert alone[kind]["before"] > 0.9
        assert alone[kind]["difference"]["high"] < -0.7
        assert replayed[kind]["difference"]["value"] > -0.1
    assert all(changes["name"]["difference"]["low"] > 0.8 for changes in (alone, replayed))
    assert found["0"]["replay"]["share"] == 0.25
    assert (folder / "forgetting.png").is_file()
    assert (tmp_path / "forgetting.png").is_file()


@pytest.mark.slow
def test_preferences_remove_a_planted_answer_and_keep_the_rest(tmp_path: Path):
    """Green and blue things are called red before, and clearly no more after; all other answers stay as right."""
    subprocess.run([sys.executable, str(EXAMPLES / "preference.py"), "--output", str(tmp_path)], check=True)
    found = json.loads((tmp_path / "preference.json").read_text())
    planted = found.pop("green and blue")
    assert planted["before"] < 0.1
    assert planted["difference"]["low"] > 0.7
    unseen = found.pop("green and blue, unseen shape")
    assert unseen["difference"]["low"] > 0.2
    assert found.keys() == {"red", "other colours", "shape", "count", "place"}
    for change in found.values():
        assert change["before"] > 0.9
        assert change["difference"]["value"] > -0.05
    assert (tmp_path / "preference.png").is_file()
    assert "| green and blue |" in (tmp_path / "preference.md").read_text()
