"""A resumed stream begins with the next record: the same losses and weights, and nothing is decoded twice."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.records.test_tar import address, serve
from tests.fixtures import losses, newest_checkpoint, reseal
from vlm.data import dataset as encoded
from vlm.data import stream
from vlm.data.records import http

KINDS: dict[str, list[str]] = {
    "plain": ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"],
    "rows": ["trainer.packing=true", "trainer.max_tokens_per_batch=60", "dataset.max_length=60"],
    "best_fit": ["trainer.packing=true", "trainer.packing_strategy=best_fit", "trainer.max_tokens_per_batch=80",
                 "dataset.max_length=60"],
}  # fmt: skip
NUM_STEPS, SAVED = 8, 5


@pytest.fixture(scope="module")
def sources(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources with weights: lines, and Parquet of several row groups; one record cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("sources")
    records = json.loads((world / "records.json").read_text())
    lines = [json.dumps(record) for record in records]
    lines[3] = '{"id": "torn'
    (folder / "a.jsonl").write_text("\n".join(lines))
    rows = [{"id": f"p{record['id']}", "text": json.dumps(record["conversations"])} for record in records]
    texts = [{**row, "conversations": json.loads(row.pop("text"))} for row in rows]
    texts = [row for row, record in zip(texts, records, strict=True) if "image" not in record] * 4
    pq.write_table(pa.Table.from_pylist(texts), folder / "b.parquet", row_group_size=3)
    named = {"a": ("a.jsonl", 2), "b": ("b.parquet", 1)}
    return [
        "dataset.path=null", "dataset.on_bad_sample=skip",
        *(f"dataset.sources.{name}.path={folder / file}" for name, (file, _) in named.items()),
        *(f"dataset.sources.{name}.weight={weight}" for name, (_, weight) in named.items()),
    ]  # fmt: skip


def options(kind: str, workers: int) -> list[str]:
    return [
        *KINDS[kind], f"trainer.dataloader_num_workers={workers}", f"trainer.max_steps={NUM_STEPS}",
        "dataset.streaming=true", "dataset.shuffle_buffer=5", "trainer.save_strategy=steps",
        f"trainer.save_steps={SAVED}", "trainer.save_total_limit=9", "trainer.num_samples=0",
    ]  # fmt: skip


def metrics(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["epoch"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_is_the_undisturbed_one(
    train: Callable[..., Path], sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    workers: int,
):  # fmt: skip
    """To the bit; without workers, only what is left is decoded."""
    decoded: list[str] = []
    encode = encoded.encode_sample

    def counted(source: Any, sample: Any) -> Any:
        decoded.append(sample.id)
        return encode(source, sample)

    monkeypatch.setattr(stream, "encode_sample", counted)
    whole = train("pretrain-smol", tmp_path, *sources, *options(kind, workers))
    expected, weights = losses(whole), load_file(whole / "final" / "model.safetensors")
    shown, all_decoded = metrics(whole), list(decoded)
    shutil.rmtree(whole / "final")
    for folder in whole.glob(f"checkpoint-{NUM_STEPS}"):
        shutil.rmtree(folder)
    assert newest_checkpoint(whole).name == f"checkpoint-{SAVED}"
    decoded.clear()
    resumed = train("pretrain-smol", whole, *sources, *options(kind, workers))
    assert losses(resumed) == expected
    assert metrics(resumed) == shown
    for name, weight in load_file(resumed / "final" / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    if not workers and kind != "best_fit":
        assert decoded == all_decoded[-len(decoded) :]
        assert len(decoded) <= len(all_decoded) * (NUM_STEPS - SAVED) / NUM_STEPS + 1
    elif not workers:
        assert len(decoded) < len(all_decoded)


def test_it_may_be_resumed_more_than_once(train: Callable[..., Path], sources: list[str], tmp_path: Path):
    """Two workers take turns as before, whichever of them comes first; each resumed run writes the next one's start."""
    words = [*sources, *options("rows", 2), "trainer.save_steps=1"]
    run = train("pretrain-smol", tmp_path, *words)
    expected, readers = losses(run), []
    for step in (1, 3, 6):
        checkpoint = run / f"checkpoint-{step}"
        readers.append(json.loads((checkpoint / "stream-0.json").read_text())["last_reader"])
        train("pretrain-smol", tmp_path, *words, f"trainer.resume_from_checkpoint={checkpoint}")
        assert losses(run) == expected
    assert readers == [0, 0, 1]


def test_other_readers_are_refused(train: Callable[..., Path], sources: list[str], tmp_path: Path):
    words = [*sources, *options("plain", 0), "trainer.max_steps=2", "trainer.save_steps=1"]
    run = train("pretrain-smol", tmp_path, *words)
    again = [*words, "trainer.max_steps=3"]
    for change in ("trainer.dataloader_num_workers=1", "dataset.shuffle_buffer=6", "trainer.seed=1"):
        with pytest.raises(
            ValueError, match=rf"cannot be resumed with other values of these keys:\n  {change.split('=')[0]}"
        ):
            train("pretrain-smol", tmp_path, *again, change, "trainer.resume_changes=accept")
    checkpoint = newest_checkpoint(run)
    (checkpoint / "stream-0.json").unlink()
    reseal(checkpoint)
    with pytest.raises(ValueError, match="does not record the position in the stream"):
        train("pretrain-smol", tmp_path, *again)


def test_shards_of_a_server_that_fails_are_those_of_the_disk(
    train: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also resumed in the middle of a shard, of which the bytes before are not asked for."""
    records = [record for record in json.loads((world / "records.json").read_text()) if "image" in record]
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for record in records[number::2]:
                image = (world / "images" / record["image"]).read_bytes()
                turns = json.dumps({"conversations": record["conversations"]}).encode()
                for suffix, content in (("json", turns), ("png", image)):
                    member = tarfile.TarInfo(f"{record['id']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    words = [*options("plain", 0), "dataset.shuffle_buffer=2", "trainer.per_device_train_batch_size=3"]
    local = train("pretrain-smol", tmp_path / "local", f'dataset.path="{tmp_path}/{{0..1}}.tar"', *words)
    with serve(tmp_path, [503, 3000, 503, 700, 2000, 502]) as server:
        path = f'dataset.path="{address(server, "{0..1}.tar")}"'
        run = train("pretrain-smol", tmp_path / "run", path, *words)
        assert losses(run) == losses(local)
        assert not server.failures
        server.requests.clear()
        checkpoint = f"trainer.resume_from_checkpoint={run / f'checkpoint-{SAVED}'}"
        train("pretrain-smol", tmp_path / "run", path, *words, checkpoint)
        assert losses(run) == losses(local)
        assert any(asked and asked != "bytes=0-" for asked in server.requests)
