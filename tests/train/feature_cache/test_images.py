"""Features of images on disk: computed once, trained on as on the images, bounded, and whole or not there."""

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures import losses
from tests.train.heads.head_runs import logged
from vlm.data.feature_cache.store import FEATURES_FILE, FORMAT_FILE, PARTIAL_SUFFIX
from vlm.models import VLMForConditionalGeneration
from vlm.train.feature_cache import fingerprints, images
from vlm.train.feature_cache.encoder import FrozenVisualEncoder

SHORT = [
    "trainer.num_train_epochs=2", "trainer.max_steps=-1", "trainer.num_samples=0", "trainer.eval_strategy=epoch",
    "trainer.packing=false",
]  # fmt: skip
SPLIT = "dataset.eval_split=0.25"


@pytest.fixture(scope="module")
def start(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`start(cache, *overrides)`: a short run that keeps features in a folder of its own."""

    def of(cache: Path, *overrides: str, keeps: bool = True, name: str = "pretrain-smol") -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        words = [*SHORT, f"dataset.cache_dir={cache}", *([SPLIT] if "eval" not in "".join(overrides) else [])]
        return train(name, folder, *words, *(["dataset.cache_features=true"] if keeps else []), *overrides)

    return of


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views each call of the encoder sees, whoever calls it."""
    seen: list[int] = []
    original = VLMForConditionalGeneration.encode_images

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.extend([len(pixels)] * (pixels.device.type != "meta"))  # operations are counted there
        return original(self, pixels)

    monkeypatch.setattr(VLMForConditionalGeneration, "encode_images", counted)
    return seen


def packs(cache: Path) -> set[Path]:
    return {form.parent for form in cache.glob(f"image_features/*/*/{FORMAT_FILE}")}


def evaluated(folder: Path) -> list[tuple[float, float]]:
    return [(line["eval_loss"], line["eval_blank_loss"]) for line in logged(folder) if "eval_loss" in line]


def assert_same_weights(one: Path, other: Path, atol: float = 1e-5) -> None:
    """Of the models that are saved, which have their encoder."""
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=10 * atol)
    assert any(name.startswith("visual_encoder.") for name in weights[0])


VARIANTS: dict[str, list[str]] = {
    "padded": [],
    "packed, an adapter": [
        "trainer.packing=true", "trainer.lora.language_model.r=2",
        "trainer.learning_rate.language_model_learning_rate=1e-3",
    ],
    "bf16, padded to squares": ["dataset.image_mode=pad", "trainer.bf16=true", "trainer.dataloader_num_workers=1"],
    "encoders side by side": ["model.visual_encoder.extra_encoders=[{hf_name:ENCODER,feature_layer:1}]"],
}  # fmt: skip


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_what_is_kept_trains_as_images_do(start: Callable[..., Path], tmp_path: Path, world: Path, words: list[str]):
    words = [word.replace("ENCODER", str(world / "visual_encoder")) for word in words]
    kept, anew = start(tmp_path, *words), start(tmp_path / "other", *words, keeps=False)
    atol = 5e-3 if "trainer.bf16=true" in words else 1e-5
    assert losses(kept) == pytest.approx(losses(anew), abs=atol)
    assert np.array(evaluated(kept)) == pytest.approx(np.array(evaluated(anew)), abs=atol)
    if not any("lora" in word for word in words):
        assert_same_weights(kept, anew, atol)
    assert packs(tmp_path)
    assert not packs(tmp_path / "other")


def test_weights_of_replies_count_beside_kept_features(start: Callable[..., Path], tmp_path: Path, world: Path):
    records = json.loads((world / "records.json").read_text())
    for record in records:
        question, reply = record["conversations"][:2]
        record["conversations"] = [question, reply | {"weight": 0.1}, {"from": "human", "value": "sure?"}, reply]
    (path := tmp_path / "weighted.json").write_text(json.dumps(records))
    words = [f"dataset.path={path}", "dataset.template=chatml"]
    kept, anew = start(tmp_path, *words), start(tmp_path / "other", *words, keeps=False)
    assert packs(tmp_path)
    assert losses(kept) == pytest.approx(losses(anew), abs=1e-5)


def test_the_encoder_is_not_called_again(start: Callable[..., Path], tmp_path: Path, encoded: list[int]):
    """Every distinct image once, a blank one, and one to look at the form; nothing in another run."""
    first = start(tmp_path, SPLIT)
    assert sum(encoded) == 18 + 1 + 1
    whole = packs(tmp_path)
    encoded.clear()
    again = start(tmp_path, SPLIT)
    assert losses(again) == losses(first)
    assert encoded == [1], "to look at the form"
    assert packs(tmp_path) == whole


def test_more_images_are_added_to_what_is_kept(
    start: Callable[..., Path], tmp_path: Path, world: Path, encoded: list[int]
):
    """Another file of records that has some of them; a run on images that have changed."""
    records = json.loads((world / "records.json").read_text())
    shutil.copytree(world / "images", tmp_path / "images")
    (tmp_path / "records.json").write_text(json.dumps(records[:12]))
    where = [f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={tmp_path / 'images'}"]
    start(tmp_path, SPLIT, *where)
    encoded.clear()
    (tmp_path / "records.json").write_text(json.dumps(records))
    start(tmp_path, SPLIT, *where)
    assert sum(encoded) == 1 + 18 - 9
    assert len(packs(tmp_path)) == 2
    encoded.clear()
    Image.new("RGB", (30, 20), "white").save(tmp_path / "images" / "0.png")
    start(tmp_path, SPLIT, *where)
    assert sum(encoded) == 1 + 1


def test_another_encoder_or_processing_is_kept_by_itself(
    start: Callable[..., Path], tmp_path: Path, encoded: list[int]
):
    start(tmp_path, SPLIT)
    for words in (["dataset.image_mode=pad"], ["model.visual_encoder.feature_layer=1"]):
        encoded.clear()
        start(tmp_path, SPLIT, *words)
        assert sum(encoded) == 20
    assert len({pack.parent for pack in packs(tmp_path)}) == 3


TILES = ["model.anyres.grids=[[1,2],[2,1]]", "dataset.max_length=null"]
VIEWS = 1 + (4 * 3 + 4 + 1) + (4 * 3 + 4)
"""One to look at the form; four images by themselves with two tiles each, the same as some of several, a dummy; blank
ones of their sizes."""


@pytest.mark.parametrize(("words", "views"), [(TILES, VIEWS), ([], 1 + 4 + 1)], ids=["tiles", "squares"])
def test_several_images_a_sample_and_tiles(
    start: Callable[..., Path], tmp_path: Path, words: list[str], views: int, encoded: list[int]
):
    """An image that is one of several has no tiles; sizes are those of the images."""
    sizes = [(30, 20), (20, 40), (50, 22), (24, 24)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    shown = [[0], [1], [2], [0, 3], [], [3], [1, 2], [0]]
    records = [
        {"id": str(number), **({"image": [f"{one}.png" for one in named]} if named else {}), "conversations": [
            {"from": "human", "value": "<image>" * len(named) + "what?"}, {"from": "gpt", "value": "a square"}]}
        for number, named in enumerate(shown)
    ]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    where = [
        f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={tmp_path}",
        f"dataset.eval_path={tmp_path / 'records.json'}", "trainer.per_device_train_batch_size=3",
    ]  # fmt: skip
    kept = start(tmp_path / "cache", *where, *words)
    computed = len(encoded)
    anew = start(tmp_path / "other", *where, *words, keeps=False)
    assert losses(kept) == pytest.approx(losses(anew), abs=1e-5)
    assert np.array(evaluated(kept)) == pytest.approx(np.array(evaluated(anew)), abs=1e-5)
    assert_same_weights(kept, anew)
    assert sum(encoded[:computed]) == views


def test_sources_share_images(start: Callable[..., Path], tmp_path: Path, world: Path, encoded: list[int]):
    words = ["dataset.path=null"]
    words += [f"dataset.sources.{name}.path={world / 'records.json'}" for name in ("one", "two")]
    kept = start(tmp_path, *words, f"dataset.eval_path={world / 'records.json'}")
    assert sum(encoded) == 20
    assert (kept / "final" / "model.safetensors").is_file()


def test_a_run_goes_on_with_what_is_kept(start: Callable[..., Path], tmp_path: Path, encoded: list[int]):
    words = ["trainer.save_strategy=steps", "trainer.save_steps=3"]
    first = start(tmp_path, SPLIT, *words)
    before = losses(first)
    encoded.clear()
    shutil.rmtree(first / "final")
    for late in first.glob("checkpoint-*"):
        if late.name != "checkpoint-3":
            shutil.rmtree(late)
    start(tmp_path, SPLIT, *words, f"trainer.output_dir={first}")
    assert losses(first)[-1] == pytest.approx(before[-1], abs=1e-6)
    assert sum(encoded) == 1


@pytest.fixture
def torn(world: Path, tmp_path: Path) -> list[str]:
    """Overrides for records of which one image is cut off."""
    shutil.copytree(world / "images", tmp_path / "images")
    image_file = tmp_path / "images" / "12.png"
    image_file.write_bytes(image_file.read_bytes()[:50])
    return [f"dataset.image_folder={tmp_path / 'images'}", "dataset.check_samples=0"]


def test_a_torn_image_is_refused_or_left_out(start: Callable[..., Path], tmp_path: Path, torn: list[str]):
    with pytest.raises(ValueError, match=r"12\.png does not open"):
        start(tmp_path, "trainer.eval_strategy=no", *torn)
    assert not packs(tmp_path)
    assert not list(tmp_path.rglob(f"*{PARTIAL_SUFFIX}"))
    words = ["dataset.on_bad_sample=skip", "trainer.eval_strategy=no", *torn]
    assert "12.png does not open" in (start(tmp_path, *words) / "skipped.jsonl").read_text()


def test_no_room_is_said_before_anything_is_written(start: Callable[..., Path], tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=rf"need {19 * mmap.PAGESIZE / 1e9:.3g} GB more .* 1e-06 GB are allowed \(dataset.cache_limit_gb=1e-06",
    ):
        start(tmp_path, SPLIT, "dataset.cache_limit_gb=1e-6")
    assert not list(tmp_path.rglob(FEATURES_FILE))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views each call of the encoder sees, of which the third runs out of memory."""
    original = FrozenVisualEncoder.__call__
    calls: list[int] = []

    def fails(self: FrozenVisualEncoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return original(self, pixels)

    monkeypatch.setattr(FrozenVisualEncoder, "__call__", fails)
    return calls


def test_an_error_while_it_is_computed_leaves_nothing(start: Callable[..., Path], tmp_path: Path, failing: list[int]):
    with pytest.raises(RuntimeError, match="out of memory"):
        start(tmp_path, SPLIT)
    assert len(failing) == 3
    assert not list(tmp_path.rglob(FEATURES_FILE))


def test_packs_that_were_done_before_an_error_stay(
    start: Callable[..., Path], tmp_path: Path, failing: list[int], monkeypatch: pytest.MonkeyPatch
):
    """The first four views, in a pack of their own."""
    monkeypatch.setattr(images, "VIEWS_PER_PACK", 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        start(tmp_path, SPLIT, "trainer.per_device_train_batch_size=4")
    assert failing == [1, 4, 4]
    assert len(packs(tmp_path)) == 1
    failing[3:] = []
    kept = start(tmp_path, SPLIT, "trainer.per_device_train_batch_size=4")
    assert failing[3:] == [1, 4, 4, 4, 3]
    assert len(packs(tmp_path)) == 5
    anew = start(tmp_path / "other", SPLIT, "trainer.per_device_train_batch_size=4", keeps=False)
    assert losses(kept) == pytest.approx(losses(anew), abs=1e-5)


def test_packs_of_a_run_that_is_over_make_room(start: Callable[..., Path], tmp_path: Path, encoded: list[int]):
    """In the same process, as in a sweep."""
    limit = f"dataset.cache_limit_gb={30 * mmap.PAGESIZE / 1e9}"
    start(tmp_path, SPLIT, limit)
    (first,) = {pack.parent for pack in packs(tmp_path)}
    start(tmp_path, SPLIT, limit, "model.visual_encoder.feature_layer=1")
    (second,) = {pack.parent for pack in packs(tmp_path)}
    assert first != second


def test_a_stores_name_tells_what_opens_images(monkeypatch: pytest.MonkeyPatch):
    before = fingerprints.code_digest(FrozenVisualEncoder)
    content, version = Path.read_bytes, fingerprints.installed_version
    for file in ("images.py", "jpeg.py", "pixels.py", "video.py", "encoder.py", "processing_vlm.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda self, file=file: content(self) + b"#" * (self.name == file))
            assert fingerprints.code_digest(FrozenVisualEncoder) != before, file
    for library in ("torchvision", "pillow", "simplejpeg", "timm", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                fingerprints, "installed_version", lambda name, one=library: "0" if name == one else version(name)
            )
            assert fingerprints.code_digest(FrozenVisualEncoder) != before, library
    assert fingerprints.code_digest(FrozenVisualEncoder) == before
