"""Features of pictures on disk: computed once, trained on as on the pictures, bounded, and whole or not there."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import losses
from tests.train.head_runs import logged
from vlm.data import feature_files
from vlm.data.feature_files import FORM, PARTIAL, ROWS, Form, Pack, finish_pack, make_room, new_pack, open_packs
from vlm.models import VLMForConditionalGeneration
from vlm.train.encoding import Encoding

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
    original = VLMForConditionalGeneration._encode

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.extend([len(pixels)] * (pixels.device.type != "meta"))  # operations are counted there
        return original(self, pixels)

    monkeypatch.setattr(VLMForConditionalGeneration, "_encode", counted)
    return seen


def packs(cache: Path) -> set[Path]:
    return {form.parent for form in cache.glob(f"image_features/*/*/{FORM}")}


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
    "bf16, padded to squares": ["dataset.image_mode=pad", "trainer.bf16=true"],
    "encoders side by side": ["model.visual_encoder.beside=[{hf_name:ENCODER,feature_layer:1}]"],
}  # fmt: skip


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_what_is_kept_trains_as_pictures_do(start: Callable[..., Path], tmp_path: Path, world: Path, words: list[str]):
    words = [word.replace("ENCODER", str(world / "visual_encoder")) for word in words]
    kept, anew = start(tmp_path, *words), start(tmp_path / "other", *words, keeps=False)
    atol = 5e-3 if "trainer.bf16=true" in words else 1e-5
    assert losses(kept) == pytest.approx(losses(anew), abs=atol)
    assert np.array(evaluated(kept)) == pytest.approx(np.array(evaluated(anew)), abs=atol)
    if not any("lora" in word for word in words):
        assert_same_weights(kept, anew, atol)
    assert packs(tmp_path)
    assert not packs(tmp_path / "other")


def test_the_encoder_is_not_called_again(start: Callable[..., Path], tmp_path: Path, encoded: list[int]):
    """Every distinct picture once, a blank one, and one to look at the form; nothing in another run."""
    first = start(tmp_path, SPLIT)
    assert sum(encoded) == 18 + 1 + 1
    whole = packs(tmp_path)
    encoded.clear()
    again = start(tmp_path, SPLIT)
    assert losses(again) == losses(first)
    assert encoded == [1], "to look at the form"
    assert packs(tmp_path) == whole


def test_more_pictures_are_added_to_what_is_kept(
    start: Callable[..., Path], tmp_path: Path, world: Path, encoded: list[int]
):
    """Another file of records that has some of them; a run on pictures that have changed."""
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
"""One to look at the form; four pictures by themselves with two tiles each, the same as some of several, a dummy; blank
ones of their sizes."""


@pytest.mark.parametrize(("words", "views"), [(TILES, VIEWS), ([], 1 + 4 + 1)], ids=["tiles", "squares"])
def test_several_pictures_a_sample_and_tiles(
    start: Callable[..., Path], tmp_path: Path, words: list[str], views: int, encoded: list[int]
):
    """A picture that is one of several has no tiles; sizes are those of the pictures."""
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


def test_sources_share_pictures(start: Callable[..., Path], tmp_path: Path, world: Path, encoded: list[int]):
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
    start(tmp_path, SPLIT, *words, f"trainer.output_dir={first}", "trainer.resume_from_checkpoint=true")
    assert losses(first)[-1] == pytest.approx(before[-1], abs=1e-6)
    assert sum(encoded) == 1


@pytest.fixture
def torn(world: Path, tmp_path: Path) -> list[str]:
    """Overrides for records of which one picture is cut off."""
    shutil.copytree(world / "images", tmp_path / "images")
    picture = tmp_path / "images" / "12.png"
    picture.write_bytes(picture.read_bytes()[:50])
    return [f"dataset.image_folder={tmp_path / 'images'}", "dataset.check_samples=0"]


def test_a_torn_picture_is_refused_or_left_out(start: Callable[..., Path], tmp_path: Path, torn: list[str]):
    with pytest.raises(ValueError, match=r"12\.png does not open"):
        start(tmp_path, "trainer.eval_strategy=no", *torn)
    assert not packs(tmp_path)
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
    words = ["dataset.on_bad_sample=skip", "trainer.eval_strategy=no", *torn]
    assert "12.png does not open" in (start(tmp_path, *words) / "skipped.jsonl").read_text()


def test_no_room_is_said_before_anything_is_written(start: Callable[..., Path], tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"need 2.19e-05 GB more .* 1e-06 GB are allowed \(dataset.cache_limit_gb=1e-06"
    ):
        start(tmp_path, SPLIT, "dataset.cache_limit_gb=1e-6")
    assert not list(tmp_path.rglob(ROWS))


# files

FORM_OF_ONE = Form("bfloat16", 2, 3)


def made(store: Path, name: str, *values: float, limit: float | None = None) -> Pack:
    """A pack of pictures of one view each, filled with these numbers."""
    with new_pack(store, name, len(values), FORM_OF_ONE, limit, []) as folder:
        rows = feature_files.opened_rows(folder, FORM_OF_ONE)
        for place, value in enumerate(values):
            rows[place] = torch.full((6,), value, dtype=torch.bfloat16).view(torch.uint8).numpy()
        numbers = np.arange(len(values))
        keys = [key_of(value) for value in values]
        finish_pack(folder, FORM_OF_ONE, keys, numbers, np.ones_like(numbers), np.zeros((len(values), 2), int), {})
        return Pack(store / name)


def key_of(value: float) -> bytes:
    return np.array([7, int(value * 8)], dtype=np.uint64).tobytes()  # the first halves are all alike


def test_a_pack_is_read_by_key(tmp_path: Path):
    pack = made(tmp_path / "store", "a", 3.0, 1.0, 2.0)
    found = feature_files.ImageFeatures([pack])
    for value in (1.0, 2.0, 3.0):
        seen = found.find(key_of(value))
        assert seen is not None
        assert torch.equal(found.read(seen), torch.full((1, 2, 3), value, dtype=torch.bfloat16))
    assert found.find(key_of(4.0)) is None


def test_what_was_not_used_for_longest_makes_room_and_what_is_read_stays(tmp_path: Path):
    store = tmp_path / "store"
    packs_ = {name: made(store, name, *range(10)) for name in ("a", "b", "c")}
    for age, name in enumerate(("b", "a", "c")):
        os.utime(store / name / "used", (age, age))
    packs_["a"].close()
    packs_["b"].close()
    made(store, "d", *range(10), limit=360e-9).close()
    assert {pack.folder.name for pack in open_packs(store)} == {"a", "c", "d"}, "the oldest goes, and no more than that"
    packs_["c"].touch()
    with pytest.raises(ValueError, match="need 3e-07 GB more"):
        make_room(tmp_path, 300, 360e-9, [])
    assert {pack.folder.name for pack in open_packs(store)} == {"a", "c", "d"}, "nothing goes where that is not enough"
    assert torch.equal(packs_["c"].read(1, 1), torch.ones(1, 2, 3, dtype=torch.bfloat16))


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.test_seeing import FORM_OF_ONE
from vlm.data.feature_files import new_pack
with new_pack(Path(sys.argv[1]), "a", 10, FORM_OF_ONE, None, []) as folder:
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_what_a_killed_run_leaves_is_not_read_and_goes(tmp_path: Path):
    """While it lives, it is left alone."""
    store = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    begun = Path(process.stdout.readline().strip())
    feature_files.sweep(tmp_path)
    assert begun.is_dir()
    process.kill()
    process.wait()
    assert not open_packs(store)
    for _ in range(50):
        feature_files.sweep(tmp_path)
        if not begun.exists():
            break
        time.sleep(0.1)
    assert not begun.exists()
    assert len(made(store, "a", 1.0)) == 1


def test_an_error_while_it_is_computed_leaves_nothing(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = Encoding.__call__
    calls: list[int] = []

    def fails(self: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return original(self, pixels)

    monkeypatch.setattr(Encoding, "__call__", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        start(tmp_path, SPLIT)
    assert not list(tmp_path.rglob(ROWS))
