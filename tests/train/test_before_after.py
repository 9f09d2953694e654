"""`trainer.before_after`: the model of the start is compared with that of the end, in a resumed run too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import check_config, compose_config
from tests.train.test_distributed_runs import launch
from vlm.checks.fields import ConfigError
from vlm.train.before_after import BeforeAfter

WORDS = [
    "trainer.before_after=true", "trainer.before_after_probe=1", "trainer.before_after_samples=8",
    "inference.max_new_tokens=3", "trainer.num_samples=0",
    "dataset.template=chatml", "trainer.per_device_eval_batch_size=8",
]  # fmt: skip


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def words(world: Path) -> list[str]:
    records = f"dataset.eval_path={world / 'records.json'}"
    return [*WORDS, records, f"dataset.eval_image_folder={world / 'images'}", "trainer.eval_strategy=no"]


@pytest.fixture(scope="module")
def stopped(train: Callable[..., Path], words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has a checkpoint of its first step, and no finished model."""
    folder = tmp_path_factory.mktemp("run")
    train("finetune-smol", folder, *words, "trainer.max_steps=2", "trainer.save_steps=1", "trainer.save_strategy=steps")
    return folder


def test_a_run_leaves_what_moved(stopped: Path):
    folder = stopped / "before_after"
    results = json.loads((folder / "results.json").read_text())
    before, after = read_lines(folder / "before.jsonl"), read_lines(folder / "after.jsonl")
    assert len(before) == len(after) == 8 + 7
    assert [row["blank_loss"] is None for row in before] == [not row["media"] for row in before]
    known = [change for change in results["changes"] if (change["split"], change["measure"]) == ("all", "loss")]
    (held_out,) = (change for change in known if change["dataset"] == "held-out" and not change["is_blank"])
    assert held_out["before"] == pytest.approx(sum(row["loss"] for row in before[:8]) / 8)
    assert held_out["difference"]["value"] == pytest.approx(held_out["after"] - held_out["before"])
    assert held_out["before"] != held_out["after"]
    assert [row["other_loss"] is None for row in after] == [not row["answer"] for row in before]
    assert (folder / "moved.png").stat().st_size > 1000
    assert "worse.html" in (folder / "report.md").read_text()


def test_the_figures_of_the_start_are_kept(
    train: Callable[..., Path], words: list[str], stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that goes on compares with the model that it began with, not with the one that it goes on from."""
    run = shutil.copytree(stopped, tmp_path / "run")
    before = (run / "before_after/before.jsonl").read_bytes()
    after = [{**row, "media": ""} for row in read_lines(run / "before_after/after.jsonl")]  # the run has moved
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(run / name)
    (run / "before_after/after.jsonl").unlink()
    titles = []
    measure = BeforeAfter._measure

    def listed(self: BeforeAfter, title: str, others: Any) -> Any:
        titles.append(title)
        return measure(self, title, others)

    monkeypatch.setattr(BeforeAfter, "_measure", listed)
    steps = ["trainer.max_steps=2", "trainer.save_steps=1", "trainer.save_strategy=steps"]
    train("finetune-smol", run, *words, *steps)
    assert titles == ["after training"]
    assert (run / "before_after/before.jsonl").read_bytes() == before
    assert [{**row, "media": ""} for row in read_lines(run / "before_after/after.jsonl")] == after
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(run / name)
    with pytest.raises(ValueError, match=r"has answers to other records. Set trainer\.before_after_samples"):
        train("finetune-smol", run, *words, *steps, "trainer.before_after_samples=3")
    (run / "before_after/before.jsonl").unlink()
    with pytest.raises(ValueError, match="does not exist, because the run began without this setting"):
        train("finetune-smol", run, *words, *steps)


def test_what_cannot_be_compared_is_refused(common: list[str]):
    def refused(name: str, *words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_config(compose_config(name, [*common, "trainer.before_after=true", *words]))
        return str(caught.value)

    assert "this run trains a head; leave it out" in refused("head-binary", "dataset.eval_split=null")
    nothing = refused("finetune-smol", "trainer.before_after_probe=0", "trainer.eval_strategy=no")
    assert "neither evaluation records nor a probe" in nothing


@pytest.mark.slow
def test_two_ranks_measure_as_one_does(common: list[str], words: list[str], stopped: Path, tmp_path: Path):
    """Under ZeRO-3 too, where every rank takes part in every call."""
    launch([
        "-cn", "finetune-smol", *common, *words, "trainer.max_steps=2", "trainer.deepspeed=zero3",
        f"trainer.output_dir={tmp_path / 'two'}",
    ])  # fmt: skip
    two = read_lines(tmp_path / "two/before_after/before.jsonl")
    for row, other in zip(two, read_lines(stopped / "before_after/before.jsonl"), strict=True):
        assert (row["id"], row["answer"]) == (other["id"], other["answer"])
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-3)
    assert (tmp_path / "two/before_after/report.md").is_file()
