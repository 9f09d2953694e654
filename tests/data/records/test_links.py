"""Folders of data lead nowhere else: links, names that are addresses, cards and states that name other files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm.config.dataset_schema import SourceConfig
from vlm.data.records import tar
from vlm.data.records.links import (
    check_data_files,
    check_data_folder,
    check_links,
    find_root,
    leads_outside,
    list_shards,
)
from vlm.data.records.open import open_records, stream_records
from vlm.data.records.tar import expand_shards
from vlm.data.sample import BadSample, ImageRef, Sample, Turn, VideoRef
from vlm.data.sources import Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data beside a secret."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"a")
    return tmp_path / "data"


def link(folder: Path, name: str, target: Path) -> Path:
    (folder / name).symlink_to(target, target_is_directory=target.is_dir())
    return folder / name


def test_links_within_the_folder_stay_in_it(folder: Path):
    (folder / "deep").mkdir()
    (folder / "deep" / "a.png").write_bytes(b"a")
    assert not leads_outside(folder / "deep" / "a.png", folder)
    assert not leads_outside(link(folder, "b.png", folder / "deep" / "a.png"), folder)
    assert not leads_outside(link(folder, "flat", folder / "deep") / "a.png", folder)


@pytest.mark.parametrize("way", ["file", "folder", "chain", "relative", "prefix"])
def test_links_out_of_the_folder_are_seen(folder: Path, way: str):
    outside = folder.parent
    match way:
        case "file":
            path = link(folder, "a.png", outside / "secret.png")
        case "folder":
            path = link(folder, "b", outside / "elsewhere") / "a.png"
        case "chain":
            path = link(folder, "d.png", link(folder, "c.png", outside / "secret.png"))
        case "relative":
            path = link(folder, "e.png", Path("../secret.png"))
        case _:
            (outside / "data-of-others").mkdir()
            path = link(folder, "f", outside / "data-of-others")
    assert leads_outside(path, folder)


def test_a_folder_that_is_a_link_itself_was_named_by_the_user(folder: Path):
    (folder / "a.png").write_bytes(b"a")
    named = link(folder.parent, "named", folder)
    assert not leads_outside(named / "a.png", named)


def test_a_snapshot_of_the_hubs_cache_leads_to_its_own_blobs(tmp_path: Path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "x").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    assert find_root(str(snapshot)) == str(blobs.parent)
    assert not leads_outside(link(snapshot, "a.parquet", blobs / "x"), snapshot)
    assert leads_outside(link(snapshot, "b.parquet", tmp_path / "secret"), snapshot)


def sample_of(*media: ImageRef | VideoRef) -> Sample:
    return Sample("7", (Turn("user", (*media, "what?")), Turn("assistant", ("that",))))


def test_images_and_videos_of_a_record_are_looked_at(folder: Path):
    secret = link(folder, "a.png", folder.parent / "secret.png")
    for media in (ImageRef(secret), VideoRef(secret), ImageRef(secret, frame=1)):
        with pytest.raises(BadSample, match=r"a.png is a link that leads out .*dataset.follow_links=true follows it"):
            check_links(sample_of(media), folder)
    check_links(sample_of(ImageRef(secret, b"bytes of its own")), folder)
    check_links(sample_of(ImageRef(folder.parent / "secret.png")), folder)  # a reader of the user's own says so


@pytest.mark.parametrize("follows", [False, True])
def test_a_source_follows_links_where_it_is_asked_to(folder: Path, follows: bool):
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    link(folder, "a.png", folder.parent / "secret.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    (folder / "a.json").write_text(json.dumps([{"id": "7", "image": "a.png", "conversations": turns}]))
    config = SourceConfig(path=str(folder / "a.json"), follow_links=follows)
    source = Source("a", config, folder.parent / "cache", None, 8)  # pyright: ignore[reportArgumentType] - not asked
    if follows:
        assert source.parse(source.records[0]).images
    else:
        with pytest.raises(BadSample, match="leads out of the image folder"):
            source.parse(source.records[0])


def test_shards_that_are_links_are_followed_where_asked(folder: Path):
    link(folder, "a.tar", folder.parent / "secret.png")
    with pytest.raises(ValueError, match=r"a.tar is a link that leads out of its folder"):
        list_shards(folder, follow_links=False)
    with pytest.raises(ValueError, match=r"a.tar is a link"):
        list(stream_records(str(folder), folder / "cache"))
    assert list_shards(folder, follow_links=True) == [folder / "a.tar"]


def test_addresses_are_text_and_files_are_paths(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    for name in ("pipe:x.tar", "b.tar"):
        (folder / name).write_bytes(b"")
    assert expand_shards(".") == [Path("b.tar"), Path("pipe:x.tar")]
    assert expand_shards("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]
    assert expand_shards("pipe:cat x", allow_pipe=True) == ["pipe:cat x"]
    with pytest.raises(ValueError, match="this is a shell command"):
        expand_shards("pipe:cat x")
    with pytest.raises(ValueError, match="stands for more than"):
        expand_shards("{0..99999999}.tar")


def write_card(text: str, name: str = "README.md") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def write_state(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a card that names an address": write_card("---\nconfigs:\n- data_files: https://host/a.parquet\n---\n"),
    "a card that names a chain": write_card("---\nconfigs:\n- data_files: ['zip://a::x']\n---\n"),
    "a card that names a path": write_card("---\nconfigs:\n- data_files: [{split: train, path: [/etc/x]}]\n---\n"),
    "a card that goes up": write_card("---\nconfigs:\n- data_dir: ../elsewhere\n---\n"),
    "another card": write_card("configs:\n- data_files: {train: ../secret.csv}\n", ".huggingface.yaml"),
    "a state": write_state,
    "splits": write_card('{"splits": ["../elsewhere"]}', "dataset_dict.json"),
    "a name": lambda folder: (folder / "zip:::x.csv").write_text("a\n1\n"),
    "a folder's name": lambda folder: (folder / "http:").mkdir(),
    "a linked file": lambda folder: link(folder, "a.csv", folder.parent / "secret.png"),
    "a linked folder": lambda folder: link(folder, "b", folder.parent / "elsewhere"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_of_a_data_set_does_not_lead_elsewhere(folder: Path, name: str):
    (folder / "a0.csv").write_text("a\n1\n")
    check_data_folder(folder, follow_links=False)
    HOSTILE[name](folder)
    with pytest.raises(ValueError, match=r"leads out|would be taken for an address|which is not in its folder"):
        check_data_folder(folder, follow_links=False)
    with pytest.raises(ValueError, match=r"leads out|would be taken for an address|which is not in its folder"):
        open_records(str(folder), folder.parent / "cache")
    if "linked" in name:
        check_data_folder(folder, follow_links=True)


def test_an_ordinary_card_is_no_trouble(folder: Path):
    write_card(
        "---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files: [{split: train, path: 'data/*.csv'}]\n---\nx\n"
    )(folder)
    check_data_folder(folder, follow_links=False)
    write_card("no head, but https://host/x.parquet and ../ in the text")(folder)
    check_data_folder(folder, follow_links=False)


def test_files_of_a_data_set_on_the_hub_are_its_own(folder: Path):
    check_data_files(["hf://datasets/a/b@1/x.csv"], "a/b")
    for file in ("hf://datasets/a/c@1/x.csv", "https://host/x.csv", "/etc/passwd"):
        with pytest.raises(ValueError, match="which is not its own"):
            check_data_files([file], "a/b")
    with pytest.raises(ValueError, match="which is not its own"):
        check_data_files([str(folder / "a::b.csv")], str(folder))


@pytest.mark.parametrize("path", ["https://host/a.parquet", "zip://x::https://host/a.arrow", "s3://bucket/a.parquet"])
def test_other_addresses_are_not_opened(path: str, tmp_path: Path):
    with pytest.raises(ValueError, match="the only web addresses"):
        open_records(path, tmp_path / "cache")


def test_a_huge_file_in_a_shard_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A sparse file, or one of compressed zeros, takes no space in the shard and all of the memory."""
    import io
    import tarfile

    monkeypatch.setattr(tar, "MAX_SAMPLE_BYTES", 1000)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as shard:
        info = tarfile.TarInfo("a.json")
        info.size = 501
        shard.addfile(info, io.BytesIO(bytes(501)))
    (folder / "a.tar.gz").rename(folder / "a.tar")
    (found,) = stream_records(str(folder), folder / "cache")
    assert "the files of a have more than 1,000 bytes" in str(found)


def test_many_files_of_one_sample_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Their sum is in memory, whatever stands between them; another sample counts from 0."""
    import io
    import tarfile

    monkeypatch.setattr(tar, "MAX_SAMPLE_BYTES", 3000)
    names = ["a.0.txt", "a.1.txt", "README", "b.0.txt", "b.1.txt", "README", "b.2.txt", "NOTES", "b.3.txt"]
    with tarfile.open(folder / "a.tar", "w") as shard:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 300
            shard.addfile(info, io.BytesIO(b"x" * 300))
    first, last = stream_records(str(folder), folder / "cache")
    assert isinstance(first, dict)
    assert "the files of b have more than 3,000 bytes" in str(last)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_huge_name_in_a_shard_is_told(folder: Path, kind: bytes):
    """`tarfile` reads names and further fields into memory, whatever their length is."""
    import gzip
    import tarfile

    info = tarfile.TarInfo("a.json")
    info.type, info.size = kind, 8 << 20
    (folder / "a.tar").write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(info.size + 1024), 1))
    (found,) = stream_records(str(folder), folder / "cache")
    assert "the name or fields of a file have 8,388,608 bytes" in str(found)


def test_links_and_devices_in_a_shard_are_passed_over(folder: Path):
    import tarfile

    with tarfile.open(folder / "a.tar", "w") as shard:
        for kind, name in ((tarfile.SYMTYPE, "a.json"), (tarfile.LNKTYPE, "b.json"), (tarfile.CHRTYPE, "c.json")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(folder.parent / "secret.png")
            shard.addfile(info)
    assert list(stream_records(str(folder), folder / "cache")) == []
