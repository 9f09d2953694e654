"""Two ranks on the CPU that encode images together and train on what they kept: the single process's losses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families.tiny_families import save_family
from tests.fixtures import losses
from tests.tiny_parts import picture
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


# Families

SHOWN = ([(40, 30)], [(20, 64)], [], [], [(16, 16), (40, 30)], [(40, 30)], [], [(64, 20)])
"""Widths and heights of the images of each record; a rank has two records a step, and once none with an image."""
FAMILY_WORDS = [
    "trainer.bf16=false", "trainer.tf32=null", "trainer/unfreeze=connector-language-model",
    "trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.learning_rate.connector_learning_rate=1e-3",
    "trainer.max_steps=3", "trainer.num_samples=0", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0",
    "trainer.gradient_accumulation_steps=1", "trainer.activation_checkpointing=false", "trainer.adam_epsilon=1e-3",
    "dataset.max_length=2048", "trainer.train_sampling_strategy=sequential", "trainer.save_strategy=no",
]  # fmt: skip
FROZEN_CONNECTOR = "trainer.unfreeze.train_connector=false"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images of several sizes, two in one record, none in others."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, sizes in enumerate(SHOWN):
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
            picture(10 * number + place, size).save(folder / name)
        question = {"from": "human", "value": "<image>\n" * len(names) + "what?"}
        turns = [question, {"from": "gpt", "value": "noise" * (1 + number % 2)}]
        made.append({"id": str(number), "image": names, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(made))
    return [f"dataset.path={folder / 'records.json'}", f"dataset.image_folder={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["null", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llava-1.5", ()),
        ("llava-onevision", ()),
        ("llava-onevision", (FROZEN_CONNECTOR,)),
        ("idefics3", ()),
        ("qwen3-vl", (FROZEN_CONNECTOR,)),
    ],
)
def test_families_on_two_ranks_reach_the_single_process(
    brief: list[str], train_whole: Callable[..., Path], records: list[str], tmp_path: Path, family: str,
    more: tuple[str, ...], stage: str,
):  # fmt: skip
    """Two ranks with cached features have the losses and weights of one process that encodes images each time."""
    model = tmp_path / "model"
    save_family(family, model)
    name, words = "finetune-llava-onevision", [*records, *FAMILY_WORDS, *more]
    whole = ("trainer.deepspeed=null", "trainer.per_device_train_batch_size=4")
    single = train_whole(name, model, tmp_path / "single", *words, *whole)
    two = [
        "-cn", name, *brief, *words, f"model.hf_name={model}", f"trainer.deepspeed={stage}",
        "trainer.per_device_train_batch_size=2", "dataset.cache_features=true",
        f"dataset.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    launch([*two, f"trainer.output_dir={tmp_path / 'two'}"])
    compare(tmp_path / "two", single)
    (kept,) = tmp_path.glob(f"cache/image_features/*/*/{FORMAT_FILE}")
    written = kept.stat().st_mtime_ns
    launch([*two, f"trainer.output_dir={tmp_path / 'again'}"])
    compare(tmp_path / "again", single)
    assert [form.stat().st_mtime_ns for form in tmp_path.glob(f"cache/image_features/*/*/{FORMAT_FILE}")] == [written]


def compare(found: Path, expected: Path) -> None:
    """Compare the losses and the final weights of two runs."""
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    weights, others = (load_file(run / "final" / "model.safetensors") for run in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=5e-5, msg=name)
