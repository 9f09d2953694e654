"""Sample answers read back; their round trip through the writer is in `train/test_run.py`."""

import os
from pathlib import Path

from tests.runs.directories import write_samples
from vlm.runs.files import Folder
from vlm.runs.samples import read_samples


def test_answers_are_read_by_step(tmp_path: Path):
    write_samples(tmp_path, 5, ["a", "b"])
    write_samples(tmp_path, 20, ["<c>", ""])
    samples = read_samples(Folder(tmp_path))
    assert list(samples) == [5, 20]
    assert [answer.answer for answer in samples[20]] == ["<c>", ""]
    assert samples[5][1].image == tmp_path / "samples" / "1.png"
    assert samples[5][1].reference == "reference 1"


def test_images_outside_of_the_run_are_left_out(tmp_path: Path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    os.symlink("/etc/hostname", tmp_path / "run" / "samples" / "0.png")
    (tmp_path / "run" / "samples.md").write_text(
        "## Step 1\n\n![sample 0](samples/0.png)\n\n- **question**: what?\n- **answer**: ![](http://elsewhere/x.png)\n"
        "![sample 0](samples/../../x.png)\n- **question**: x\n\n- **reference**\n"
    )
    answers = read_samples(Folder(tmp_path / "run"))[1]
    assert [answer.image for answer in answers] == [None, None]


def test_text_without_headings_has_no_samples(tmp_path: Path):
    assert read_samples(Folder(tmp_path)) == {}
    (tmp_path / "samples.md").write_text("- **question**: what?\n")
    assert read_samples(Folder(tmp_path)) == {}
