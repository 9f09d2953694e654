"""The cache: made once whoever asks, nothing half done, and a content's hash that is computed once."""

import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HOME

from tests.waiting import HANG, wait_until
from vlm.data.cache import content_hash, create_once, json_digest, resolve_cache_folder

ROOT = Path(__file__).parents[2]
MAKER = """
import os, signal, sys, time
from pathlib import Path
from vlm.data.cache import create_once

folder, deed = Path(sys.argv[1]), sys.argv[2]

def make(partial):
    with (folder / "made.txt").open("a") as file:
        file.write("x")
    partial.write_text("hal")
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    partial.write_text("whole")

(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print(create_once(folder / "cache" / "deep" / "a.arrow", make).read_text())
"""
"""A process that waits for a file `go` and then asks for one of the cache."""


def makers(folder: Path, *deeds: str) -> list[subprocess.Popen[str]]:
    """Processes that begin at the same time."""
    for left in (*folder.glob("ready-*"), *folder.glob("go")):
        left.unlink()
    command = [sys.executable, "-c", MAKER, str(folder)]
    started = [subprocess.Popen([*command, deed], stdout=subprocess.PIPE, text=True, cwd=ROOT) for deed in deeds]
    wait_until(lambda: len(list(folder.glob("ready-*"))) == len(deeds), *started)
    (folder / "go").touch()
    return started


def test_processes_that_start_at_once_make_a_file_once(tmp_path: Path):
    found = [maker.communicate(timeout=HANG)[0] for maker in makers(tmp_path, "make", "make", "make")]
    assert found == ["whole\n"] * 3
    assert (tmp_path / "made.txt").read_text() == "x"


def test_a_maker_that_is_killed_leaves_nothing(tmp_path: Path):
    (dead,) = makers(tmp_path, "die")
    assert dead.wait(HANG) == -signal.SIGKILL
    place = tmp_path / "cache" / "deep" / "a.arrow"
    assert not place.exists()
    (alive,) = makers(tmp_path, "make")
    assert alive.communicate(timeout=HANG)[0] == "whole\n"
    assert not place.with_name("a.arrow.partial").exists()


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path):
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        create_once(tmp_path / "a", fail)
    assert not (tmp_path / "a").exists()
    create_once(tmp_path / "a", lambda partial: partial.write_text("whole") and None)
    assert (tmp_path / "a").read_text() == "whole"


def test_what_is_there_is_not_made_again(tmp_path: Path):
    (tmp_path / "a").write_text("there")
    create_once(tmp_path / "a", lambda partial: pytest.fail("made again"))


# Hashes


def times(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_atime_ns, facts.st_mtime_ns


def test_a_hash_is_that_of_the_content(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"content")
        assert content_hash(tmp_path / name, tmp_path / "cache") == sha256(b"content").hexdigest()
    (tmp_path / "a").write_bytes(b"another")
    os.utime(tmp_path / "a", ns=(1, 1))
    assert content_hash(tmp_path / "a", tmp_path / "cache") == sha256(b"another").hexdigest()


def test_a_file_of_the_same_size_and_time_is_not_read_again(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    before = content_hash(path, tmp_path / "cache")
    kept = times(path)
    path.write_bytes(b"changed")
    os.utime(path, ns=kept)
    assert content_hash(path, tmp_path / "cache") == before
    os.utime(path, ns=(kept[0], kept[1] + 1))
    assert content_hash(path, tmp_path / "cache") == sha256(b"changed").hexdigest()


def test_a_file_of_another_size_is_read_again_whatever_its_time(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    content_hash(path, tmp_path / "cache")
    kept = times(path)
    path.write_bytes(b"content and more")
    os.utime(path, ns=kept)
    assert content_hash(path, tmp_path / "cache") == sha256(b"content and more").hexdigest()


def test_a_cache_can_be_deleted_at_any_time(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"content")
    before = content_hash(tmp_path / "a", tmp_path / "cache")
    for stored in (tmp_path / "cache" / "hashes").iterdir():
        stored.unlink()
    assert content_hash(tmp_path / "a", tmp_path / "cache") == before


# Names


def test_the_cache_lies_with_hugging_faces_unless_it_is_named():
    assert resolve_cache_folder(None) == Path(HF_HOME, "vlm")
    assert resolve_cache_folder("here") == Path("here")


def test_a_digest_depends_on_values_and_their_order_but_not_on_that_of_keys():
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    names = [json_digest(*values) for values in ((1, 2), (2, 1), (12,), ("1", "2"), ([1, 2],), (1, 2, None), ())]
    assert len({*names}) == len(names)
    assert all(len(name) == 32 for name in names)
