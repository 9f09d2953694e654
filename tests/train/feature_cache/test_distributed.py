"""Two ranks on the CPU that encode images together and train on what they kept: the single process's losses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures import losses
from tests.train.test_distributed_runs import launch
from vlm.data.feature_cache.store import FORMAT_FILE

WORDS = [
    "trainer.num_train_epochs=1", "trainer.max_steps=-1", "trainer.num_samples=0", "trainer.eval_strategy=epoch",
    "trainer.packing=false", "trainer.train_sampling_strategy=sequential",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_two_ranks_reach_the_single_process(
    common: list[str], train: Callable[..., Path], tmp_path: Path, world: Path, stage: str
):
    """Also where the encoder's weights are shared out, and is on the path of no batch; then again from what is kept."""
    own = [*WORDS, f"dataset.eval_path={world / 'records.json'}"]
    single = train("pretrain-smol", tmp_path / "single", *own)
    words = [
        "-cn", "pretrain-smol", *common, *own, f"trainer.deepspeed={stage}", "trainer.per_device_train_batch_size=4",
        "dataset.cache_features=true", f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    launch([*words, f"trainer.output_dir={tmp_path / 'two'}"])
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=2e-4)
    assert (tmp_path / "two" / "final" / "model.safetensors").is_file()
    kept = {form: form.stat().st_mtime_ns for form in tmp_path.glob(f"cache/image_features/*/*/{FORMAT_FILE}")}
    assert kept
    launch([*words, f"trainer.output_dir={tmp_path / 'again'}"])
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert {form: form.stat().st_mtime_ns for form in tmp_path.glob(f"cache/image_features/*/*/{FORMAT_FILE}")} == kept


@pytest.mark.slow
def test_equal_images_stand_once_on_each_rank(
    common: list[str], train: Callable[..., Path], tmp_path: Path, world: Path
):
    """Ranks with more and with fewer distinct images, and blank ones, under ZeRO-3 with an encoder that trains."""
    words = [*WORDS, f"dataset.eval_path={world / 'records.json'}", "trainer.unfreeze.train_vision_model=true",
             "trainer.learning_rate.visual_encoder_learning_rate=1e-3"]  # fmt: skip
    single = train("pretrain-smol", tmp_path / "single", *words)
    launch([
        "-cn", "pretrain-smol", *common, *words, "trainer.deepspeed=zero3", "trainer.per_device_train_batch_size=4",
        f"trainer.output_dir={tmp_path / 'two'}",
    ])  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=2e-4)


@pytest.mark.slow
def test_two_ranks_write_several_packs(common: list[str], train: Callable[..., Path], tmp_path: Path):
    """And one of them again, when it has gone."""
    single = train("pretrain-smol", tmp_path / "single", *WORDS, "trainer.eval_strategy=no")
    words = [
        "-cn", "pretrain-smol", *common, *WORDS, "trainer.eval_strategy=no", "trainer.deepspeed=zero2",
        "trainer.per_device_train_batch_size=4", "dataset.cache_features=true",
        f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    launch([*words, f"trainer.output_dir={tmp_path / 'two'}"], "tests.train.feature_cache.small_packs")
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=2e-4)
    packs = {form.parent for form in tmp_path.glob(f"cache/image_features/*/*/{FORMAT_FILE}")}
    assert len(packs) == 5
    shutil.rmtree(gone := min(packs))

    launch([*words, f"trainer.output_dir={tmp_path / 'again'}"], "tests.train.feature_cache.small_packs")
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert gone.is_dir()
