"""Two ranks on the CPU, each with the whole teacher: the single process's losses, and the same again when resumed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.train.distillation.distillation_runs import KEY, STATES, STUDENT, save_narrow, train_teacher
from tests.train.test_distributed_runs import launch
from vlm.data.feature_cache.store import FORMAT_FILE

SHARDINGS = {
    "ddp": [],
    "zero2": ["trainer.deepspeed=zero2"],
    "zero3": ["trainer.deepspeed=zero3"],
    "fsdp2": ["trainer.sharding=fsdp2"],
}


@pytest.fixture(scope="module")
def words(train: Callable[..., Path], world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a student that is narrower than its teacher."""
    folder = tmp_path_factory.mktemp("models")
    narrow = save_narrow(world, folder / "narrow")
    return [
        *STUDENT, f"{KEY}.teacher={train_teacher(train, folder)}", f"model.language_model.hf_name={narrow}",
        "trainer.save_strategy=steps", "trainer.save_steps=2", f"dataset.eval_path={world / 'records.json'}",
        "trainer.eval_strategy=epoch",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def single(train: Callable[..., Path], words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return train("distil-smol", tmp_path_factory.mktemp("single") / "run", *words, *STATES)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_reach_the_single_process(
    common: list[str], words: list[str], single: Path, tmp_path: Path, sharding: str
):
    """With matrices to the teacher's width, which are shared out as the student is and in no finished model."""
    command = [
        "-cn", "distil-smol", *common, *words, *STATES, *SHARDINGS[sharding], f"trainer.output_dir={tmp_path}",
        "trainer.per_device_train_batch_size=4",
    ]  # fmt: skip
    launch(command)
    assert losses(tmp_path) == pytest.approx(losses(single), abs=3e-4)
    expected = load_file(single / "final" / "model.safetensors")
    found = load_file(tmp_path / "final" / "model.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in expected.items()}
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "final")
    launch(command)
    assert losses(tmp_path) == pytest.approx(losses(single), abs=3e-4)


@pytest.mark.slow
def test_two_ranks_ask_the_teacher_together(
    common: list[str], words: list[str], train: Callable[..., Path], tmp_path: Path
):
    kept = [f"{KEY}.top_k=16", f"dataset.cache_dir={tmp_path / 'cache'}"]
    single = train("distil-smol", tmp_path / "single", *words, f"{KEY}.top_k=16", f"dataset.cache_dir={tmp_path}")
    command = ["-cn", "distil-smol", *common, *words, *kept, "trainer.deepspeed=zero3"]
    command.append("trainer.per_device_train_batch_size=4")
    launch([*command, f"trainer.output_dir={tmp_path / 'two'}"])
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=1e-3)
    forms = {form: form.stat().st_mtime_ns for form in tmp_path.glob(f"cache/teacher_logits/*/*/{FORMAT_FILE}")}
    assert len(forms) == 1, "training and evaluation have the same records"
    launch([*command, f"trainer.output_dir={tmp_path / 'again'}"])
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "two"), abs=1e-6)
    assert {form: form.stat().st_mtime_ns for form in forms} == forms
