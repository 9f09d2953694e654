"""`vlm submit`: where a job file goes, and what is refused before it is written."""

from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.cli.main import main
from vlm.cli.submit import find_run_name


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("records.json").write_text("[]")
    return "dataset.path=records.json"


def test_a_job_has_one_run_directory_however_often_it_is_queued(records: str, capsys: pytest.CaptureFixture[str]):
    main(["submit", "-cn", "pretrain-smol", "nodes=2", records])
    assert capsys.readouterr().out == "Wrote pretrain-smol.sbatch.\nHand it in:  sbatch pretrain-smol.sbatch\n"
    assert "trainer.output_dir=outputs/pretrain-smol-2" in Path("pretrain-smol.sbatch").read_text()
    main(["submit", "-cn", "pretrain-smol", "--output", "b.sh", records, "trainer.output_dir=there"])
    assert "outputs/" not in Path("b.sh").read_text()


def test_what_the_run_would_refuse_is_refused_now(records: str):
    assert "trainer.max_step" in refusal("submit", "-cn", "pretrain-smol", records, "trainer.max_step=3")
    assert "no such file" in refusal("submit", "-cn", "pretrain-smol", "dataset.path=/cluster/records.json")
    assert not Path("pretrain-smol.sbatch").exists()
    main(["submit", "--no-check", "-cn", "pretrain-smol", "dataset.path=/cluster/records.json"])
    assert Path("pretrain-smol.sbatch").exists()


def test_a_job_that_cannot_be_handed_in_is_said_to_be_written(records: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    run = ["-cn", "pretrain-smol", records]
    assert "there is no sbatch on this machine" in refusal("submit", "--submit", *run)
    assert "HEAD=<first node> bash pretrain-smol.sh" in refusal("submit", "--submit", "--target", "torchrun", *run)


def test_a_job_is_handed_in(records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" > "$0.words"\nexit 3\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert refusal("submit", "--submit", "-cn", "pretrain-smol", records) == "3"
    assert (tmp_path / "sbatch.words").read_text() == "pretrain-smol.sbatch\n"


def test_the_name_of_a_run():
    assert find_run_name(["-cn", "x", "a=b"]) == find_run_name(["--config-name=x"]) == "x"
    assert find_run_name(["a=b"]) is None
    assert find_run_name(["-cn"]) is None
