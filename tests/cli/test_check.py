"""`vlm check` prints the page, writes it, and ends with 1 where the run would be refused."""

from pathlib import Path

import pytest

from tests.checks.test_messages import elsewhere  # noqa: F401 - Hydra leaves files behind
from vlm.cli.check import without_data
from vlm.cli.main import main
from vlm.train.preflight import inspect
from vlm.train.preflight.findings import Findings, Problem


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch):
    """Let runs name models of the Hub, which nothing opens here."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


@pytest.mark.parametrize("is_fatal", [True, False])
def test_the_page_is_printed_and_written(
    is_fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def inspect_run(config: object, name: str, overrides: list[str]) -> Findings:
        """Find one problem."""
        assert overrides == ["trainer.starts_from", "dataset.path"]
        return Findings(name, "nothing", problems=[Problem("it is wrong", "a=b", is_fatal)])

    monkeypatch.setattr(inspect, "inspect_run", inspect_run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[]")
    words = ["check", "-cn", "finetune-smol", "trainer.starts_from=null", "dataset.path=x.json"]
    if is_fatal:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 1
    else:
        main(words)
    assert "it is wrong\n    → a=b" in capsys.readouterr().out
    assert "it is wrong" in Path("outputs", "preflight-finetune-smol.html").read_text(encoding="utf-8")


def test_a_forgotten_start_is_refused_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit, match="vlm: finetune-smol starts from a model that pretrain-smol trained"):
        main(["check", "-cn", "finetune-smol", "dataset.path=x.json"])


def test_a_plan_reads_no_records(tmp_path: Path):
    words = [
        "-cn",
        "finetune-smol",
        "dataset.path=/far/a.json",
        "dataset.image_folder=/far",
        "dataset.eval_path=/far/b",
    ]
    records = tmp_path / "records.json"
    expected = ["-cn", "finetune-smol", f"dataset.path={records}", f"dataset.eval_path={records}"]
    assert without_data(words, tmp_path) == expected
    assert records.read_text() == "[]"


def test_the_first_rank_alone_prints_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(inspect, "inspect_run", lambda config, name, overrides: Findings(name, "nothing"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[]")
    main(["check", "-cn", "finetune-smol", "trainer.starts_from=null", "dataset.path=x.json"])
    assert capsys.readouterr().out == ""
    assert not Path("outputs").exists()


def test_a_plan_needs_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="a plan needs one process; start it without a launcher"):
        main(["check", "--plan", "GPUS=8xH100", "-cn", "finetune-smol"])
