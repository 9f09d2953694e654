"""Tar shards are read from any sample on: files, compressed files, and addresses whose server fails at times."""

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlm.data.records import http
from vlm.data.records.open import stream_with_positions
from vlm.data.records.positions import END, Position
from vlm.data.records.tar import read_tar
from vlm.data.sample import BadSample

stream = partial(stream_with_positions, cache=Path("unused"))


def write_tar(path: Path, names: list[str], size: int = 700) -> Path:
    """Samples of two files each, with a folder and a file that belongs to none in between; one name is long."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(_member("folder/", 0, tarfile.DIRTYPE))
            for suffix, content in (("json", json.dumps({"id": name}).encode()), ("jpg", name.encode() * size)):
                tar.addfile(_member(f"{name}.{suffix}", len(content)), io.BytesIO(content))
            tar.addfile(_member("__meta__", 1), io.BytesIO(b"x"))
    return path


def _member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


NAMES = ["a", "b" * 150, "c", "d"]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "0.tar", NAMES)


def names_of(records: Iterator[tuple[Any, Any]]) -> list[str]:
    return [record["__key__"] for record, _ in records]


@pytest.mark.parametrize("kind", ["file", "compressed", "command"])
def test_a_shard_is_read_on_behind_any_sample(shard: Path, tmp_path: Path, kind: str):
    url = str(shard)
    if kind == "compressed":
        url = str(tmp_path / "1.tar")
        Path(url).write_bytes(gzip.compress(shard.read_bytes()))
    elif kind == "command":
        url = f"pipe:cat {shard}"
    places = [0, *(behind for _, behind in read_tar(url))]
    assert places == sorted(places)
    for taken, place in enumerate(places):
        assert names_of(read_tar(url, place)) == NAMES[taken:]


def test_what_was_read_is_not_read_again(shard: Path):
    """Nothing before the position is looked at: it may be gone."""
    places = [behind for _, behind in read_tar(str(shard))]
    content = bytearray(shard.read_bytes())
    content[: places[1]] = b"x" * places[1]
    shard.write_bytes(content)
    assert names_of(read_tar(str(shard), places[1])) == NAMES[2:]


def test_a_torn_shard_is_told_and_left(shard: Path):
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    *whole, (last, behind) = read_tar(str(shard))
    assert whole
    assert isinstance(last, BadSample)
    assert behind == END


@pytest.mark.parametrize(("files", "shards"), [(1, 3), (4, 2), (5, 2)])
def test_shards_of_records_are_read_on(tmp_path: Path, files: int, shards: int):
    """Whole files where there are enough, else every so many records of all."""
    for number in range(files):
        write_tar(tmp_path / f"{number}.tar", [f"{number}{letter}" for letter in "abcdefg"], 1)
    seen = []
    for shard in range(shards):
        options: Any = {"shard": shard, "num_shards": shards, "seed": 7}
        whole = list(stream(str(tmp_path), **options))
        seen += [record["id"] for record, _ in whole]
        for taken, (_, position) in enumerate(whole, start=1):
            assert list(stream(str(tmp_path), start=position, **options)) == whole[taken:]
    assert sorted(seen) == [f"{number}{letter}" for number in range(files) for letter in "abcdefg"]


class Flaky(BaseHTTPRequestHandler):
    """Serves files with ranges, and fails as its server says: a status, or the number of bytes to send."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.requests.append(self.headers.get("Range"))
        failure = server.failures.pop(0) if server.failures else None
        if isinstance(failure, int) and failure < 600:
            self.send_error(failure)
            return
        content = (server.folder / self.path.strip("/")).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-")) if server.knows_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", str(len(server.requests) if server.changes else 0))
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : None if failure is None else start + failure])

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path, failures: list[int], *, knows_ranges: bool = True) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.folder, server.failures, server.knows_ranges = folder, failures, knows_ranges
    server.requests, server.changes = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def address(server: Any, name: str = "0.tar") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between tries; nothing waits."""
    waited: list[float] = []
    monkeypatch.setattr(http.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_server_may_fail(
    shard: Path, waits: list[float], caplog: pytest.LogCaptureFixture, knows_ranges: bool
):  # fmt: skip
    """Tried again after longer and longer, read on from the byte that comes next, and told."""
    expected = list(read_tar(str(shard)))
    with serve(shard.parent, [503, 503, 5000, 900, 502], knows_ranges=knows_ranges) as server:
        assert list(read_tar(address(server))) == expected
        assert server.requests[:3] == [None, None, None]
        assert server.requests[3].startswith("bytes=") == knows_ranges or not knows_ranges
    assert waits[:2] == [1.0, 2.0]
    assert len([line for line in caplog.messages if "read on from byte" in line]) == len(waits) >= 4


def test_an_address_is_read_from_a_byte_on(shard: Path, waits: list[float]):
    places = [behind for _, behind in read_tar(str(shard))]
    with serve(shard.parent, []) as server:
        assert names_of(read_tar(address(server), places[2])) == NAMES[3:]
        assert names_of(read_tar(address(server), places[3])) == []
        assert names_of(read_tar(address(server), shard.stat().st_size)) == []
        assert server.requests[0] == f"bytes={places[2]}-"


@pytest.mark.parametrize(
    ("failures", "reason", "num_waits"), [([404], "404", 0), ([503] * 20, "failed 8 times in a row", 7)]
)
def test_a_server_that_refuses_or_fails_for_long_is_told(
    shard: Path, waits: list[float], failures: list[int], reason: str, num_waits: int
):
    with serve(shard.parent, failures) as server:
        ((found, behind),) = read_tar(address(server))
    assert isinstance(found, BadSample)
    assert reason in found.reason
    assert behind == END
    assert len(waits) == num_waits


def test_a_file_that_changes_meanwhile_is_told(shard: Path, waits: list[float]):
    with serve(shard.parent, [2000]) as server:
        server.changes = True
        *_, (found, _) = read_tar(address(server))
    assert isinstance(found, BadSample)
    assert "has changed" in found.reason


def test_addresses_are_taken_by_braces(tmp_path: Path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [f"{number}a"], 1)
    with serve(tmp_path, []) as server:
        found = list(stream(address(server, "{0..1}.tar")))
    assert [record["id"] for record, _ in found] == ["0a", "1a"]
    assert [position.file for _, position in found] == [0, 1]
    assert isinstance(found[0][1], Position)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:9/a.tar", "file:///etc/passwd", "pipe:touch mark"])
def test_a_server_does_not_lead_to_other_kinds_of_addresses(target: str, waits: list[float]):
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ((found, _),) = read_tar(address(server))
    finally:
        server.shutdown()
        server.server_close()
    assert "302" in str(found)
    assert not waits
