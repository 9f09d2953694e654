"""What heads read of a frozen body: computed once, the same as if it were not, and again where anything differs."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.fixtures import losses
from tests.train.heads.head_runs import SHORT, logged
from vlm.data.feature_cache import store as feature_store
from vlm.data.feature_cache.heads import HeadFeatureDataset, collate_features
from vlm.data.feature_cache.store import FEATURES_FILE, LOCK_FILE, PARTIAL_SUFFIX
from vlm.data.heads.dataset import BlankHeadDataset
from vlm.models import VLMForPrediction
from vlm.train.feature_cache import heads
from vlm.train.feature_cache.heads import HeadFeatureWriter

ROWS = f"features/*/*/{FEATURES_FILE}"


@pytest.fixture(scope="module")
def start(train_head: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`start(cache, *overrides)`: a short run that keeps what it computes in a folder of its own."""

    def of(cache: Path, *overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        words = [f"dataset.cache_dir={cache}", *SHORT, *overrides]
        return train_head("head-classification", "colour", folder, *words)

    return of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts with their own images, not with blank ones, each call of the body read."""
    sizes: list[int] = []
    original = HeadFeatureWriter._read

    def counted(self: HeadFeatureWriter, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not isinstance(self.dataset, BlankHeadDataset):
            sizes.append(len(batch["input_ids"]))
        return original(self, batch)

    monkeypatch.setattr(HeadFeatureWriter, "_read", counted)
    return sizes


@pytest.fixture
def own_records(labelled: Path, tmp_path: Path) -> list[str]:
    """Overrides for records and images that a test may change."""
    shutil.copytree(labelled.parent / "labelled", tmp_path / "labelled")
    shutil.copy(labelled, tmp_path / "records.json")
    return [f"dataset.path={tmp_path / 'records.json'}", f"dataset.image_folder={tmp_path}"]


def files(cache: Path) -> set[str]:
    return {file.name for file in cache.glob("features/*/*") if file.name != "lock"}


@pytest.mark.parametrize(
    "words",
    [[], ["model.head.pooling=attention", "model.head.options.dropout=0.3"], ["model.head.pooling=alltoken"],
     ["model.head.pooling=image", "model.head.layer=1", "trainer.bf16=true", "trainer.dataloader_num_workers=1"]],
    ids=["last", "attention", "alltoken", "bf16"],
)  # fmt: skip
def test_what_is_kept_trains_as_what_is_computed(start: Callable[..., Path], tmp_path: Path, words: list[str]):
    """Losses, evaluation and the head that is saved."""
    words = [*words, "trainer.num_train_epochs=2", "trainer.max_steps=-1", "trainer.eval_strategy=epoch"]
    kept = start(tmp_path, *words)
    anew = start(tmp_path / "other", *words, "dataset.cache_features=false")
    atol = 5e-3 if "trainer.bf16=true" in words else 1e-5
    assert losses(kept) == pytest.approx(losses(anew), abs=atol)
    evaluated = [[line["eval_loss"] for line in logged(folder) if "eval_loss" in line] for folder in (kept, anew)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=atol)
    heads = [load_file(folder / "final" / "model.safetensors") for folder in (kept, anew)]
    for name, weight in heads[0].items():
        if name.startswith("heads."):
            torch.testing.assert_close(weight, heads[1][name], rtol=0, atol=10 * atol if atol > 1e-4 else atol)
    assert files(tmp_path)
    assert not files(tmp_path / "other")


def test_the_body_is_not_called_again(start: Callable[..., Path], tmp_path: Path, calls: list[int]):
    """Nor for another head, rate or division; but what is held out then is read with blank images too."""
    words = ["model.head.pooling=mean", "trainer.eval_strategy=epoch"]
    first = start(tmp_path, *words)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob(ROWS)}
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            VLMForPrediction, "_hidden_states_by_layer", lambda *given, **named: pytest.fail("the body was called")
        )
        assert losses(start(tmp_path, *words)) == losses(first)
        for other in (
            ["model.head.type=mlp"], ["trainer.learning_rate.head_learning_rate=1e-3"], ["trainer.data_seed=7"],
            ["trainer.per_device_train_batch_size=3"],
        ):  # fmt: skip
            start(tmp_path, *words, *other)
    for other in (
        ["dataset.eval_split=0.5"], ["dataset.folds=3", "dataset.eval_split=null"], ["dataset.test_split=0.2"],
    ):  # fmt: skip
        start(tmp_path, *words, *other)
    assert not calls
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_the_seed_divides_what_is_kept(start: Callable[..., Path], tmp_path: Path, composed: str, calls: list[int]):
    """On a checkpoint, whose weights no seed draws."""
    start(tmp_path, composed)
    computed = len(calls)
    start(tmp_path, composed, "trainer.seed=7")
    assert len(calls) == computed


@pytest.fixture(scope="module")
def composed(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override for a checkpoint without heads."""
    folder = train("pretrain-smol", tmp_path_factory.mktemp("runs") / "composed", "trainer.max_steps=1")
    return f"trainer.from_pretrained={folder / 'final'}"


@pytest.mark.slow
def test_whatever_it_depends_on_has_it_computed_again(
    start: Callable[..., Path], own_records: list[str], tmp_path: Path, calls: list[int], composed: str
):
    cache = tmp_path / "cache"

    def rows(*words: str) -> int:
        calls.clear()
        start(cache, *own_records, *words)
        return sum(calls)

    assert (rows(), rows()) == (48, 0)
    for words in (
        ["model.head.pooling=text"], ["model.head.layer=1"], ["model.head.pooling=token", "model.head.token='a'"],
        ["dataset.image_mode=pad"], ["dataset.template=v1"], ["dataset.system_prompt=Look."], ["trainer.seed=7"],
        ["trainer.bf16=true"], ["model.head.pooling=attention"],
    ):  # fmt: skip
        assert rows(*words) == 48, words
    Image.new("RGB", (30, 21), "white").save(tmp_path / "labelled" / "3.png")
    assert rows() == 48
    records = json.loads((tmp_path / "records.json").read_text())
    records[7]["prompt"] = "and what is here?"
    (tmp_path / "records.json").write_text(json.dumps(records))
    assert rows() == 48
    (tmp_path / "records.json").write_text(json.dumps(records[:-1]))
    assert rows() == 47
    checkpoint = Path(composed.split("=")[1])
    shutil.copytree(checkpoint, tmp_path / "model")
    moved = f"trainer.from_pretrained={tmp_path / 'model'}"
    assert (rows(composed), rows(moved)) == (47, 0)  # the same weights in another place
    state = load_file(checkpoint / "model.safetensors")
    state["connector.layers.0.bias"][0] += 1e-3
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert rows(moved) == 47


def test_a_new_reading_is_computed_beside_the_others(start: Callable[..., Path], tmp_path: Path, calls: list[int]):
    start(tmp_path)
    words = ["model.head.name=colour", "dataset.options.label_key=[colour,light]",
             "model.head.extra_heads.light.task=regression", "model.head.extra_heads.light.pooling=mean"]  # fmt: skip
    start(tmp_path / "two", *words)
    assert len({file.parent.name for file in (tmp_path / "two").glob(ROWS)}) == 2
    calls.clear()
    start(tmp_path / "two", *words, "model.head.extra_heads.light.pooling=last")
    start(tmp_path / "two", *words, "model.head.pooling=mean")
    assert not calls


def test_it_is_read_through_memory_maps(start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets: list[HeadFeatureDataset] = []

    class RecordedDataset(HeadFeatureDataset):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            datasets.append(self)

    monkeypatch.setattr(heads, "HeadFeatureDataset", RecordedDataset)
    start(tmp_path, "model.head.pooling=attention")
    assert datasets
    for dataset in datasets:
        for pack in dataset.packs.values():
            assert isinstance(pack.rows, np.memmap)
            assert not pack.rows.flags.writeable
    items = [datasets[0][index] for index in range(5)]
    lengths = [len(item["features"]["label"]) for item in items]
    assert len(set(lengths)) == 1  # of one prompt and one image each
    items[2]["features"]["label"] = items[2]["features"]["label"][:-4]
    batch = collate_features(items)
    assert batch["attention_mask"].sum(dim=1).tolist() == [lengths[0], lengths[0], lengths[0] - 4, *[lengths[0]] * 2]
    assert not batch["features"]["label"][2, -4:].any()


def test_ragged_prompts_are_told_apart(start: Callable[..., Path], own_records: list[str], tmp_path: Path):
    """Rows of other lengths, one without an image among them, train as without the cache."""
    records = json.loads((tmp_path / "records.json").read_text())
    for index, record in enumerate(records):
        record["prompt"] = "what is it? " * (1 + index % 5)
        if index % 6 == 5:
            record["image"] = None
    (tmp_path / "records.json").write_text(json.dumps(records))
    words = [*own_records, "model.head.pooling=attention", "trainer.per_device_eval_batch_size=5"]
    kept, anew = start(tmp_path / "cache", *words), start(tmp_path / "cache", *words, "dataset.cache_features=false")
    assert losses(kept) == pytest.approx(losses(anew), abs=1e-5)


# Records that turn out to be unusable


def torn(folder: Path) -> None:
    """An image that begins like one, and ends too soon."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "labelled" / "40.png")
    content = (folder / "labelled" / "40.png").read_bytes()
    (folder / "labelled" / "40.png").write_bytes(content[: len(content) // 2])


def test_a_torn_image_is_an_error(start: Callable[..., Path], own_records: list[str], tmp_path: Path):
    """Now, and whenever what was kept lacks it."""
    torn(tmp_path)
    cache, words = tmp_path / "cache", [*own_records, "dataset.check_samples=0"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"records.json, record 40: .*dataset.on_bad_sample=skip leaves such"):
            start(cache, *words)
        assert not files(cache)
    skipping = [*words, "dataset.on_bad_sample=skip"]
    for _ in range(2):  # computed, and then found
        folder = start(cache, *skipping, "model.head.options.dropout=0")
        listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert [(one["record"], one["id"]) for one in listed] == [(40, "40")]
        records = json.loads((folder / "scores.json").read_text())["evaluation"]["label"]["records"]
        assert len(losses(folder)) == 3
        assert records in (11, 12)
    with pytest.raises(ValueError, match=r"records.json, record 40"):
        start(cache, *words)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "labelled" / "40.png")
    assert not (start(cache, *words) / "skipped.jsonl").read_text()


def test_too_many_torn_images_stop_the_run(start: Callable[..., Path], own_records: list[str], tmp_path: Path):
    torn(tmp_path)
    words = [*own_records, "dataset.check_samples=0", "dataset.on_bad_sample=skip", "dataset.max_skipped=0.01"]
    with pytest.raises(ValueError, match=r"dataset.max_skipped"):
        start(tmp_path / "cache", *words)
    assert not files(tmp_path / "cache")


# Runs that were killed


def test_a_run_that_was_killed_leaves_nothing_that_is_taken_for_whole(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = HeadFeatureWriter.compute

    def dies(self: HeadFeatureWriter, *arguments: Any) -> Iterator[Any]:
        yield from original(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(HeadFeatureWriter, "compute", dies)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path)
    assert not files(tmp_path)
    monkeypatch.undo()
    expected = start(tmp_path)
    # As after a kill that let nothing tidy up: a pack of this computation, and one of another
    whole = max(tmp_path.glob(ROWS), key=lambda file: file.stat().st_size)  # the other has blank images
    content = whole.read_bytes()
    partial = whole.parent.with_name(f"{whole.parent.name}{PARTIAL_SUFFIX}")
    whole.parent.rename(partial)
    other, busy = (tmp_path / "features" / name / f"a{PARTIAL_SUFFIX}" for name in ("other", "busy"))
    for folder in (other, busy):
        folder.mkdir(parents=True)
        (folder / FEATURES_FILE).write_bytes(b"half")
    with (busy / LOCK_FILE).open("w") as lock:  # another run is at work there
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert losses(start(tmp_path)) == losses(expected)
    assert whole.read_bytes() == content
    assert not other.exists()
    assert busy.exists()
    assert not partial.exists()


def test_a_full_disk_is_refused_before_anything_is_computed(
    start: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"the features that the heads read need \S+ GB more .* and 1e-07 GB free"):
        start(tmp_path)
    assert not files(tmp_path)
