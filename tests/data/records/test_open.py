"""Every kind of file and folder: asked for by number, streamed, and streamed in shares that cover it exactly once."""

import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlm.data.records.open import open_records, stream_records
from vlm.data.sample import BadSample

ROWS = [{"id": number, "text": f"línea, {number}", "more": None if number % 2 else "x"} for number in range(7)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_json(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps(ROWS))
    return str(folder / "a.json")


def write_jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(folder / "a.jsonl")


def write_parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return str(folder / "a.parquet")


def write_arrow(folder: Path) -> str:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    return str(folder / "a.arrow")


def write_separated(folder: Path, name: str, separator: str) -> str:
    lines = [separator.join(('"id"', '"text"', '"more"'))]
    lines += [separator.join((str(row["id"]), f'"{row["text"]}"', row["more"] or "")) for row in ROWS]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def save_to_disk(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def save_splits(folder: Path) -> str:
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([2, 3])}).save_to_disk(folder / "splits")
    return str(folder / "splits")


def write_folder(folder: Path) -> str:
    (folder / "tables").mkdir(exist_ok=True)
    for number in range(3):
        part = pa.Table.from_pylist(ROWS[3 * number : 3 * number + 3])
        pq.write_table(part, folder / "tables" / f"train-{number:05d}-of-00003.parquet")
    return str(folder / "tables")


KINDS: dict[str, Callable[[Path], str]] = {
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "csv": lambda folder: write_separated(folder, "a.csv", ","),
    "tsv": lambda folder: write_separated(folder, "a.tsv", "\t"),
    "saved": save_to_disk,
    "splits": save_splits,
    "folder": write_folder,
}


def expected(kind: str) -> list[dict[str, Any]]:
    """The rows, of which text files hold the numbers as texts."""
    return [{**row, "id": str(row["id"])} for row in ROWS] if kind in ("csv", "tsv") else ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_asked_for_by_number_and_streamed(tmp_path: Path, kind: str):
    path = KINDS[kind](tmp_path)
    records = open_records(path, tmp_path / "cache")
    assert len(records) == len(ROWS)
    assert [records[index] for index in range(len(records))] == expected(kind)
    assert records[-1] == expected(kind)[-1]
    assert list(stream_records(path, tmp_path / "cache")) == expected(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_shards", [2, 3, 9])
def test_shares_of_a_stream_cover_it_once(tmp_path: Path, kind: str, num_shards: int):
    path = KINDS[kind](tmp_path)
    shares = [
        list(stream_records(path, tmp_path / "cache", shard=shard, num_shards=num_shards))
        for shard in range(num_shards)
    ]
    assert sorted(row["id"] for share in shares for row in share) == [row["id"] for row in expected(kind)]
    assert sum(not share for share in shares) == max(num_shards - len(ROWS), 0)


class Share(IterableDataset[int]):
    """A worker's share of a stream, as training takes it."""

    def __init__(self, path: str, cache: Path):
        self.path, self.cache = path, cache

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        assert worker is not None
        shares = {"shard": worker.id, "num_shards": worker.num_workers}
        return (int(row["id"]) for row in stream_records(self.path, self.cache, **shares, seed=0))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "folder", "tar"])
def test_workers_of_a_loader_cover_a_stream_once(tmp_path: Path, kind: str):
    """Hugging Face's own streams share out what they are asked for once more there."""
    path = str(write_shards(tmp_path, 2)) if kind == "tar" else KINDS[kind](tmp_path)
    loader = DataLoader(Share(path, tmp_path / "cache"), batch_size=None, num_workers=2)
    assert sorted(loader) == list(range(6 if kind == "tar" else 7))


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_records_are_the_same(tmp_path: Path, kind: str):
    records = open_records(KINDS[kind](tmp_path), tmp_path / "cache")
    again = pickle.loads(pickle.dumps(records))
    assert [again[index] for index in range(len(again))] == expected(kind)
    assert again.fingerprint == records.fingerprint


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("saved", "splits")])
def test_the_fingerprint_changes_with_the_content_only(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    first = open_records(KINDS[kind](tmp_path), tmp_path / "cache").fingerprint
    path = str(tmp_path / "tables") if kind == "folder" else str(tmp_path / f"a.{kind}")
    assert open_records(path, tmp_path / "cache").fingerprint == first
    monkeypatch.setitem(ROWS[1], "text", "something longer than before")
    changed = open_records(KINDS[kind](tmp_path), tmp_path / "cache")
    assert changed.fingerprint != first
    assert changed[1]["text"] == "something longer than before"


def test_a_split_is_chosen(tmp_path: Path):
    path = save_splits(tmp_path)
    assert [open_records(path, tmp_path / "cache", split="test")[index] for index in range(2)] == ROWS[2:4]
    assert list(stream_records(path, tmp_path / "cache", split="test")) == ROWS[2:4]
    for read in (lambda **where: open_records(path, tmp_path / "cache", **where),
                 lambda **where: list(stream_records(path, tmp_path / "cache", **where))):  # fmt: skip
        with pytest.raises(ValueError, match=r"split nope.*it has the splits train, test"):
            read(split="nope")


def test_a_split_that_a_folder_lacks_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tables: does not open \(split test, .*train"):
        open_records(write_folder(tmp_path), tmp_path / "cache", split="test")


@pytest.mark.parametrize("streamed", [False, True])
def test_images_of_a_data_set_are_not_decoded(tmp_path: Path, streamed: bool):
    """Whether they can be is for the reader's own check, which names the record."""
    features = datasets.Features({"image": datasets.Image(), "images": datasets.List(datasets.Image())})
    held = {"bytes": b"no picture", "path": None}
    dataset = datasets.Dataset.from_list([{"image": held, "images": [held, held]}], features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for path in (str(tmp_path / "saved"), str(tmp_path / "a.parquet")):
        if streamed:
            (row,) = stream_records(path, tmp_path / "cache")
        else:
            row = open_records(path, tmp_path / "cache")[0]
        assert row == {"image": held, "images": [held, held]}


def test_a_seed_shuffles_the_order_of_files_alike_for_every_share(tmp_path: Path):
    path = write_folder(tmp_path)

    def ids(seed: int | None, shard: int = 0, num_shards: int = 1) -> list[int]:
        cache = tmp_path / "cache"
        return [row["id"] for row in stream_records(path, cache, shard=shard, num_shards=num_shards, seed=seed)]

    orders = [ids(seed) for seed in range(6)]
    assert ids(None) == list(range(7))
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert ids(3) == orders[3]
    for seed in range(3):
        assert sorted(number for shard in range(3) for number in ids(seed, shard, 3)) == list(range(7))


REFUSED = {
    "a.parquet": (b"", "a.parquet: the file is empty"),
    "a.csv": (b"", "a.csv: the file is empty"),
    "torn.parquet": (b"PAR1abc", r"torn.parquet: does not open \(split train"),
    "a.txt": (b"x", r"a.txt: a file named .*\.json, .*hf://owner/name is needed"),
    "none.parquet": (None, "none.parquet: does not open"),
    "none": (None, "none: a file named .* is needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_records_is_refused_by_name(tmp_path: Path, name: str):
    content, said = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_records(str(tmp_path / name), tmp_path / "cache")
    with pytest.raises(ValueError, match=said):
        list(stream_records(str(tmp_path / name), tmp_path / "cache"))


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_images_with_a_table_is_told_to_name_the_table(tmp_path: Path, table: str):
    (tmp_path / table).write_text("file_name,text\na.png,A cat.\n")
    said = f"{tmp_path}: a folder of images with a table; give the table: dataset.path={tmp_path / table} "
    with pytest.raises(ValueError, match=re.escape(said)):
        open_records(str(tmp_path), tmp_path / "cache")


# Tar shards


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, number: int) -> Path:
    """Shards of three samples each, with ids that count up."""
    (folder / "shards").mkdir()
    for shard in range(number):
        ids = range(3 * shard, 3 * shard + 3)
        write_tar(
            folder / "shards" / f"{shard:03d}.tar", {f"{number:04d}.json": b'{"id": %d}' % number for number in ids}
        )
    return folder / "shards"


def streamed(path: Any, **share: Any) -> list[Any]:
    return list(stream_records(str(path), Path("unused"), **{"allow_pipe": True, **share}))


def test_files_of_one_name_are_one_record(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", {
        "a.json": b'{"x": 1, "image": "old", "images": ["old"]}', "a.jpg": b"J",
        "deep/b.txt": "línea".encode(), "deep/b.PNG": b"P",
        "c.json": b'{"id": "own", "caption": "old"}', "c.txt": b"new", "c.cls": b"3",
    })  # fmt: skip
    assert streamed(shard) == [
        {"id": "a", "x": 1, "image": {"bytes": b"J", "path": "a.jpg"}},
        {"id": "deep/b", "caption": "línea", "image": {"bytes": b"P", "path": "deep/b.png"}},
        {"id": "own", "caption": "new"},
    ]


def test_several_images_stand_in_the_order_of_their_numbers(tmp_path: Path):
    names = [f"{number}.{'png' if number % 2 else 'jpeg'}" for number in (10, 2, 0, 9, 11, 1)]
    (record,) = streamed(write_tar(tmp_path / "a.tar", {f"s.{name}": name.encode() for name in names}))
    assert [picture["bytes"] for picture in record["images"]] == [
        b"0.jpeg", b"1.png", b"2.jpeg", b"9.png", b"10.jpeg", b"11.png",
    ]  # fmt: skip
    assert [picture["path"] for picture in record["images"]][-1] == "s.11.png"


def test_a_sample_that_is_no_record_is_its_own_trouble(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", {"a.json": b"{", "b.json": b"[]", "c.json": b"{}"})
    torn, listed, whole = streamed(shard)
    assert str(torn).startswith("record 'a': not JSON")
    assert str(listed) == "record 'b': its .json must hold a mapping, got list"
    assert whole == {"id": "c"}


WAYS: dict[str, Callable[[Path], str]] = {
    "folder": str,
    "braces": lambda shards: f"{shards}/{{000..003}}.tar",
    "pipe": lambda shards: f"pipe:cat {shards}/{{000..003}}.tar",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_shards", [1, 2, 4, 5])
def test_shards_are_dealt_whole_or_record_by_record(tmp_path: Path, way: str, num_shards: int):
    path = WAYS[way](write_shards(tmp_path, 4))
    shares = [
        [record["id"] for record in streamed(path, shard=shard, num_shards=num_shards, seed=1)]
        for shard in range(num_shards)
    ]
    assert sorted(number for share in shares for number in share) == list(range(12))
    if num_shards <= 4:
        threes = [share[at : at + 3] for share in shares for at in range(0, len(share), 3)]
        assert all(three == list(range(three[0], three[0] + 3)) for three in threes)


def test_one_shard_is_a_stream_too(tmp_path: Path):
    shards = write_shards(tmp_path, 1)
    assert [record["id"] for record in streamed(shards / "000.tar")] == [0, 1, 2]
    assert [record["id"] for record in streamed(f"pipe:cat {shards}/000.tar")] == [0, 1, 2]


BAD_SHARDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "torn": (lambda whole: whole[:2000], "unexpected end of data"),
    "no tar": (lambda whole: b"hello" * 1000, "invalid header"),
    "empty": (lambda whole: b"", "empty file"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_shard_that_does_not_read_on_is_told_and_the_next_one_follows(tmp_path: Path, name: str):
    spoil, said = BAD_SHARDS[name]
    shards = write_shards(tmp_path, 2)
    first = shards / "000.tar"
    first.write_bytes(spoil(first.read_bytes()))
    found = streamed(shards)
    (error,) = [one for one in found if isinstance(one, BadSample)]
    assert error.file == str(first)
    assert said in error.reason
    assert found[-3:] == [{"id": 3}, {"id": 4}, {"id": 5}]


def test_a_command_that_fails_is_told():
    (error,) = streamed("pipe:false")
    assert isinstance(error, BadSample)
    assert "pipe:false stopped" in error.reason


def test_a_name_twice_in_a_shard_is_told(tmp_path: Path):
    found = streamed(write_tar(tmp_path / "a.tar", [("a.json", b"{}"), ("b.json", b"{}"), ("b.json", b"{}")]))
    assert found[0] == {"id": "a"}
    assert "duplicate file name" in found[1].reason


def test_a_shard_that_does_not_exist_is_refused_before_any_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no file .*/002.tar"):
        next(stream_records(f"{write_shards(tmp_path, 2)}/{{000..002}}.tar", tmp_path / "cache"))


@pytest.mark.parametrize("way", WAYS)
def test_shards_are_not_asked_for_by_number(tmp_path: Path, way: str):
    with pytest.raises(ValueError, match=r"set dataset.streaming=true"):
        open_records(WAYS[way](write_shards(tmp_path, 1)), tmp_path / "cache")


@pytest.mark.parametrize(("name", "separator"), [("train.csv", ","), ("train.tsv", "\t")])
def test_cells_of_tables_in_a_folder_are_texts_too(tmp_path: Path, name: str, separator: str):
    (tmp_path / "tables").mkdir()
    rows = [("a", "b"), ("None", "007"), ("", "2.50"), ("True", "NA")]
    (tmp_path / "tables" / name).write_text("\n".join(map(separator.join, rows)))
    records = open_records(str(tmp_path / "tables"), tmp_path / "cache")
    expected = [{"a": "None", "b": "007"}, {"a": None, "b": "2.50"}, {"a": "True", "b": "NA"}]
    assert [records[index] for index in range(len(records))] == expected
    assert list(stream_records(str(tmp_path / "tables"), tmp_path / "cache")) == expected
