"""Runs side by side on the page."""

from pathlib import Path

from tests.web.test_runs import write_run
from vlm.runs.read import RunDirectory
from vlm.web.compare_html import comparison_html

HOSTILE = "<script>x</script>"
CONFIG = "trainer: {{max_steps: 4, num_train_epochs: 2, seed: {}}}\nnote: {}\n"


def write(folder: Path, seed: int, loss: float, answer: str) -> RunDirectory:
    write_run(
        folder, {"step": 1, "loss": 2.0}, {"step": 2, "loss": loss, "eval_loss": loss, "eval_rouge": 0.5,
                                           "eval_rouge_ci95": 0.1}, config=CONFIG.format(seed, HOSTILE),
    )  # fmt: skip
    (folder / "command.txt").write_text(f"vlm -cn pretrain-smol trainer.seed={seed}\n")
    (folder / "samples.md").write_text(f"## Step 2\n\n- **question**: what?\n- **answer**: {answer}\n")
    return RunDirectory(folder, folder.name)


def test_what_differs_is_shown_side_by_side(tmp_path: Path):
    shown = comparison_html([write(tmp_path / "one", 1, 1.5, "red"), write(tmp_path / "two", 2, 1.25, HOSTILE)])
    assert "<script>" not in shown
    for text in ("Settings that differ", "seed", "Training loss", "Evaluation loss", "0.5 ± 0.1", "red", "1.25"):
        assert text in shown
    assert "num_train_epochs" not in shown


def test_runs_without_anything_are_compared_too(tmp_path: Path):
    write_run(tmp_path / "empty")
    shown = comparison_html([RunDirectory(tmp_path / "empty", "empty"), write(tmp_path / "one", 1, 1.5, "red")])
    assert "not asked" in shown
