"""A sweep from the command line: its folders, commands, table and exit. What trains is replaced by files."""

import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.sweeper import Sweeper

from tests.runs.directories import write_run
from vlm.cli import train
from vlm.clusters.processes import GUARD_EXIT_CODE, SAVED_EXIT_CODE
from vlm.config.schema import RunConfig
from vlm.train.run_directory import _command

RATE = "trainer.learning_rate.connector_learning_rate"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands of the runs, which train nothing: a guard ends rate 3, a signal rate 4."""
    written: list[str] = []

    def write(config: RunConfig, name: str, overrides: list[str]) -> None:
        rate, folder = config.trainer.learning_rate.connector_learning_rate, Path(str(config.trainer.output_dir))
        written.append(_command())
        line = {"step": 1, "eval_loss": float(rate or 0) + config.trainer.seed / 10}
        settings = {RATE: rate, "trainer.seed": config.trainer.seed}
        write_run(folder / "run", [line], settings=settings)
        for file in (folder / "run").iterdir():
            file.rename(folder / file.name)
        (folder / "run").rmdir()
        (folder / "command.txt").write_text(written[-1])
        if rate in (3, 4):
            sys.exit(GUARD_EXIT_CODE if rate == 3 else SAVED_EXIT_CODE)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    monkeypatch.setattr(train, "train", write)
    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", lambda *given: None)  # composes all runs once more
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    return written


def sweep(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run a sweep as the command line does."""
    given = ["--multirun", "-cn", "pretrain-smol", "dataset.path=train.json", *words]
    monkeypatch.setattr(sys, "argv", ["vlm", *given])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "vlm", *given])
    train.main(given)


def test_each_run_has_its_folder_and_the_sweep_ends_in_a_table(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sweep(monkeypatch, f"{RATE}=1,2", "trainer.seed=1,2", "trainer.output_dir=out")
    folders = {path.parent.name for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    assert folders == {f"connector_learning_rate-{rate}--seed-{seed}" for rate in (1, 2) for seed in (1, 2)}
    assert "--multirun" not in commands[0]
    own = f"{RATE}=1 trainer.seed=1 trainer.output_dir=out/connector_learning_rate-1--seed-1"
    assert commands[0].rstrip().endswith(own)
    shown = capsys.readouterr().out
    assert "Best by eval_loss (lowest): connector_learning_rate=1, 1.15 ± 0.071 over 2 seeds." in shown
    assert "that is more than noise" in shown
    assert (tmp_path / "out" / "sweep.html").is_file()
    assert (tmp_path / "out" / "sweep.png").is_file()


def test_a_run_that_is_refused_or_diverges_does_not_end_the_sweep(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match=r"connector_learning_rate=-1\.0: a positive number"):
        sweep(monkeypatch, f"{RATE}=-1,3,2", "trainer.output_dir=out")
    assert len(commands) == 2
    shown = capsys.readouterr()
    assert "connector_learning_rate=-1.0: a positive number" in shown.err
    assert "Best by eval_loss (lowest): connector_learning_rate=2" in shown.out


def test_several_ranks_are_told_to_name_the_folder(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Once, and before anything is written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "^vlm: --multirun on 2 ranks: .* add trainer.output_dir=outputs/pretrain-smol-sweep$"
    with pytest.raises(SystemExit, match=told):
        sweep(monkeypatch, f"{RATE}=1,2")
    assert not commands
    assert "--multirun on" not in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    sweep(monkeypatch, f"{RATE}=1,2", "trainer.output_dir=out")
    assert len(commands) == 2


def test_a_signal_ends_the_sweep_in_a_folder_of_its_name_and_time(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        sweep(monkeypatch, f"{RATE}=4,2")
    assert ended.value.code == SAVED_EXIT_CODE
    assert len(commands) == 1
    assert "There is one run to compare: eval_loss is" in capsys.readouterr().out
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("pretrain-smol-sweep-2")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["connector_learning_rate-4"]
