"""Cached features of families: losses as of images, in every family that can; the others say why not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.tiny_families import TINY, save_family
from tests.fixtures import losses
from tests.tiny_parts import picture
from vlm.train.feature_cache.replay import FrozenPart

FULL = ["trainer.unfreeze.train_connector=false", "trainer.unfreeze.train_language_model=true"]
CONNECTOR = ["trainer.unfreeze.train_connector=true", "trainer.unfreeze.train_language_model=true"]
WORDS = [
    "trainer.deepspeed=null", "trainer.bf16=false", "trainer.tf32=null",
    "trainer/unfreeze=connector-language-model", "trainer.learning_rate.language_model_learning_rate=1e-3",
    "trainer.learning_rate.connector_learning_rate=1e-3", "trainer.max_steps=3", "trainer.num_samples=0",
    "trainer.per_device_train_batch_size=3", "trainer.lr_scheduler_type=constant",
    "trainer.warmup_steps=0", "trainer.gradient_accumulation_steps=1", "trainer.activation_checkpointing=false",
    "model.attn_implementation=eager", "dataset.max_length=2048", "trainer.train_sampling_strategy=sequential",
]  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images of several sizes, two in one record, none in another, one twice."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(40, 30), (20, 64), (16, 16), (40, 30)]):
        picture(number, size).save(folder / f"{number}.png")
    shown = [["0.png"], ["1.png"], ["2.png"], ["0.png"], [], ["3.png"]]
    listed = [
        {
            "id": str(number), "image": names,
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(names) + "what?"},
                {"from": "gpt", "value": "noise" * (1 + number % 2)},
            ],
        }
        for number, names in enumerate(shown)
    ]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(listed))
    return [f"dataset.path={folder / 'records.json'}", f"dataset.image_folder={folder}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            save_family(name, root / name)
        return root / name

    return folder


WITHIN = "its connector, which trains, is inside its visual encoder"
REFUSED = {
    ("qwen2-vl", "connector"): WITHIN,
    ("qwen2.5-vl", "connector"): WITHIN,
    ("qwen3-vl", "connector"): WITHIN,
    ("mllama", "connector"): "also returns features for samples without images",
    ("mllama", "language model"): "also returns features for samples without images",
    ("phi4-multimodal", "connector"): "its class names no visual encoder",
    ("phi4-multimodal", "language model"): "its class names no visual encoder",
}
"""Family and what trains -> why features cannot be kept."""
QUICK = ("llava-1.5", "llava-onevision", "qwen3-vl", "idefics3", "mllama")
"""The families that are looked at each time: one encoder, tiles, several outputs, rows of images, a refusal."""


@pytest.mark.parametrize("trains", ["connector", "language model"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TINY])
def test_losses_are_those_of_images(
    name: str,
    trains: str,
    train_whole: Callable[..., Path],
    folders: Callable[[str], Path],
    records: list[str],
    tmp_path: Path,
):
    words = [
        *records,
        *WORDS,
        *(CONNECTOR if trains == "connector" else FULL),
        f"dataset.cache_dir={tmp_path / 'cache'}",
    ]
    cached = [*words, "dataset.cache_features=true"]
    if (name, trains) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, trains]):
            train_whole("finetune-llava-onevision", folders(name), tmp_path / "cached", *cached)
        return
    plain = train_whole("finetune-llava-onevision", folders(name), tmp_path / "plain", *words)
    found = train_whole("finetune-llava-onevision", folders(name), tmp_path / "cached", *cached)
    assert losses(found) == pytest.approx(losses(plain), rel=1e-4)


def test_later_runs_read_what_an_earlier_one_kept(
    train_whole: Callable[..., Path], folders: Callable[[str], Path], records: list[str], tmp_path: Path
):
    """No image is encoded again, in a run that is resumed, packed or evaluated; an image that changed is."""
    words = [*records, *WORDS, *CONNECTOR, f"dataset.cache_dir={tmp_path / 'cache'}", "dataset.cache_features=true"]
    folder = folders("llava-1.5")
    train_whole("finetune-llava-onevision", folder, tmp_path / "first", *words, "trainer.save_steps=2")
    packs = {path: path.stat().st_size for path in (tmp_path / "cache" / "image_features").glob("*/*/features.bin")}
    assert len(packs) == 1
    for name, more in {
        "packed": ["trainer.packing=true", "trainer.train_sampling_strategy=random"],
        "evaluated": ["dataset.eval_split=0.34", "trainer.eval_strategy=epoch"],
        "longer": ["trainer.max_steps=4", "trainer.save_steps=2"],
    }.items():
        train_whole("finetune-llava-onevision", folder, tmp_path / name, *words, *more)
    found = {path: path.stat().st_size for path in (tmp_path / "cache" / "image_features").glob("*/*/features.bin")}
    assert found == packs
    resumed = [*words, "trainer.save_steps=2", "trainer.max_steps=4", "trainer.resume_changes=accept"]
    train_whole("finetune-llava-onevision", folder, tmp_path / "first", *resumed)
    assert losses(tmp_path / "first")[3:] == pytest.approx(losses(tmp_path / "longer")[3:], rel=1e-4)


def test_features_without_room_are_refused(
    train_whole: Callable[..., Path], folders: Callable[[str], Path], records: list[str], tmp_path: Path
):
    words = [*records, *WORDS, *CONNECTOR, f"dataset.cache_dir={tmp_path / 'cache'}", "dataset.cache_features=true"]
    with pytest.raises(ValueError, match="features of the images need"):
        train_whole(
            "finetune-llava-onevision", folders("llava-1.5"), tmp_path / "run", *words, "dataset.cache_limit_gb=1e-6"
        )


def test_features_that_change_losses_are_refused(
    train_whole: Callable[..., Path], folders: Callable[[str], Path], records: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    unpack = FrozenPart.unpack
    monkeypatch.setattr(FrozenPart, "unpack", lambda self, numbers, shapes: unpack(self, numbers.flip(0), shapes))
    words = [*records, *WORDS, *CONNECTOR, f"dataset.cache_dir={tmp_path / 'cache'}", "dataset.cache_features=true"]
    with pytest.raises(ValueError, match="with cached features the loss of a token differs by"):
        train_whole("finetune-llava-onevision", folders("llava-1.5"), tmp_path / "run", *words)
