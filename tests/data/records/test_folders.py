"""What is said of folders and files that hold no records; what may hold some is left to the library that opens it."""

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.records.folders import folder_problem
from vlm.data.records.open import open_records
from vlm.data.records.paths import path_problem


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


SAID = {
    ("a.jpg", "b.PNG"): ("a folder of 2 images, without", "dataset.path=captions.csv", "dataset.format=caption"),
    ("in/a.jpg",): ("a folder of 1 image, without", "the columns image and caption"),
    ("a.jpg", "a.txt"): ("a folder of 1 image and 1 text file", "tar --sort=name -cf pairs.tar"),
    ("a.mp4", "b.mp4"): ("a folder of 2 videos", '"video": "clip.mp4"'),
    ("a.txt", "b.md"): ("a folder of 2 text files", "*.jsonl"),
    (".hidden",): ("the folder is empty",),
    (): ("the folder is empty",),
}
"""The files of a folder -> words of what is said against it."""


@pytest.mark.parametrize(("names", "words"), SAID.items(), ids=str)
def test_a_folder_without_records_is_described_with_what_to_do(
    names: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
):
    problem = folder_problem(fill(tmp_path, *names), "dataset.path")
    assert problem is not None
    for word in words:
        assert word in problem


def test_the_keys_in_the_advice_are_those_of_the_source(tmp_path: Path):
    fill(tmp_path, "a.jpg")
    evaluation = folder_problem(tmp_path, "dataset.eval_path") or ""
    assert f"dataset.eval_path=captions.csv dataset.eval_image_folder={tmp_path} dataset.format=caption" in evaluation
    assert "dataset.sources.x.image_folder=" in (folder_problem(tmp_path, "dataset.sources.x.path") or "")


@pytest.mark.parametrize(
    "names",
    [("0.parquet",), ("a.jpg", "metadata.csv"), ("0.tar",), ("cat/a.jpg", "dog/a.jpg"), ("data.zip",), ("0.jsonl.gz",)],
    ids=str,
)
def test_a_folder_that_may_hold_records_passes(names: tuple[str, ...], tmp_path: Path):
    assert folder_problem(fill(tmp_path, *names), "dataset.path") is None


def test_a_file_that_holds_no_records_is_described_by_its_first_bytes(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png")
    assert "it is a PNG image. A file named *.json" in (path_problem(str(tmp_path / "a.png")) or "")
    assert "it is a ZIP archive: unpack it first. A file" in (path_problem(str(tmp_path / "a.zip")) or "")
    assert (path_problem(str(tmp_path / "nowhere.zip")) or "").startswith("a file named")


@pytest.mark.parametrize("name", ["parquet", "records.parquet"])
def test_a_folder_may_be_named_like_a_kind_of_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` takes the first for its own builder; Spark writes folders like the second."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    pq.write_table(pa.table({"caption": ["a cat"]}), Path(name, "part-0.parquet"))
    records = open_records(name, tmp_path / "cache")
    assert [records[index] for index in range(len(records))] == [{"caption": "a cat"}]
