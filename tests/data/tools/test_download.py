"""`vlm data download` against a server on this machine: what it leaves, and that it may be stopped anywhere."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.data.tools.test_fetch import Site, drip, picture, send
from tests.waiting import HANG, wait_until
from vlm.data.records.conversations import read_llava
from vlm.data.tools import download as module
from vlm.data.tools import fetch
from vlm.data.tools.download import DownloadSummary, DownloadWorkers, Options, download, main
from vlm.data.tools.table import Row, Table


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch, "INITIAL_RETRY_WAIT", 0.01)
    site = Site()
    yield site
    site.close()


def get(table: Path, output: Path, **changes: Any) -> DownloadSummary:
    return download(table, output, Options(**{"allow_private": True, "workers": 4, "timeout": 5.0, **changes}))


def tsv(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """Captions and URLs as Conceptual Captions has them."""
    file = folder / "captions.tsv"
    file.write_text("".join(f"{caption}\t{url}\n" for caption, url in pairs), encoding="utf-8")
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def ids(output: Path) -> list[int]:
    return [int(record["id"]) for record in lines(output / "records.jsonl")]


def reasons(output: Path) -> dict[int, str]:
    return {failure["row"]: failure["reason"] for failure in lines(output / "failures.jsonl")}


def stream_table_rows(path: Path, url: str | None = None, caption: str | None = None) -> list[tuple[str, str]]:
    return [(row.url, row.caption) for row in Table(path, url, caption).rows()]


def test_leaves_images_and_records_of_llavas_form(site: Site, tmp_path: Path):
    site.page("/named.gif", content := picture("JPEG"))
    pairs = [("a cat", site.url("/named.gif")), ("ein Bär", site.url("/png")), (' a "dog', site.url("/webp?size=1"))]
    output = tmp_path / "out"
    summary = get(tsv(tmp_path, pairs), output)
    assert (summary.got, summary.failed) == (3, {})
    records = {record["id"]: record for record in lines(output / "records.jsonl")}
    assert records["000000000"] == {
        "id": "000000000",
        "image": "00000/000000000.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}],
    }
    assert records["000000001"]["conversations"][1]["value"] == "ein Bär"
    assert records["000000002"]["conversations"][1]["value"] == 'a "dog'
    assert (output / "images/00000/000000000.jpg").read_bytes() == content
    assert sorted(path.name for path in output.iterdir()) == [
        "download.json", "failures.jsonl", "images", "records.jsonl",
    ]  # fmt: skip
    for record in records.values():
        (path,) = [image.path for image in read_llava(record, output / "images").images]
        assert path is not None
        Image.open(path).load()


def test_says_why_each_row_failed(site: Site, tmp_path: Path):
    site.page("/page.jpg", b"<html>gone</html>")
    site.page("/cut.jpg", picture("JPEG", (40, 40))[:-50])
    site.pages["/500"] = lambda handler: send(handler, 500)
    site.pages["/drip"] = lambda handler: (send(handler, 200, Content_Length="9999"), drip(handler, b"x", 0.05))[1]
    site.pages["/loop"] = lambda handler: send(handler, 302, Location="/loop")
    site.page("/large", bytes(50_001))
    expected = {
        "/missing": "HTTP 404",
        "/page.jpg": "not an image",
        "/cut.jpg": "broken image",
        "/500": "HTTP 500",
        "/drip": "timed out",
        "/loop": "too many redirects",
        "/large": "too large",
        "/png": "too small",
    }
    table = tsv(tmp_path, [("words", site.url(path)) for path in expected] + [("", site.url("/png")), ("words", "")])
    output = tmp_path / "out"
    summary = get(table, output, timeout=5.0, retries=1, max_bytes=50_000, min_size=20)
    assert summary.got == 0
    assert [reasons(output)[row] for row in range(10)] == [*expected.values(), "empty caption", "no URL"]
    assert summary.failed == Counter(reasons(output).values())
    assert lines(output / "failures.jsonl")[0].keys() == {"row", "url", "reason", "detail"}
    assert "10 failed" in str(summary)
    assert not (output / "images").exists()


def test_a_refusal_is_forgotten_once_its_option_has_another_value(site: Site, tmp_path: Path):
    """A row that no option decided stays as it is."""
    pairs = [("words", site.url("/png")), ("words", site.url("/no"))]
    table, output = tsv(tmp_path, pairs), tmp_path / "out"
    assert get(table, output, allow_private=False).failed == {"private address": 2}
    assert get(table, output, allow_private=False).failed == {"private address": 2}
    assert get(table, output, max_bytes=1).failed == {"too large": 1, "HTTP 404": 1}
    assert (get(table, output).got, site.paths.count("/no")) == (1, 1)
    assert reasons(output) == {1: "HTTP 404"}


def test_a_table_without_a_single_image_ends_with_an_error(site: Site, tmp_path: Path, capsys):
    words = [str(tsv(tmp_path, [("words", site.url("/png"))])), str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(SystemExit, match="no image was fetched"):
        main(words)
    printed = capsys.readouterr().out
    assert "to train" not in printed
    assert "private address: --allow-private fetches" in printed


def test_private_addresses_are_refused_by_default(site: Site, tmp_path: Path):
    get(tsv(tmp_path, [("words", site.url("/png"))]), tmp_path / "out", allow_private=False)
    assert reasons(tmp_path / "out") == {0: "private address"}
    assert not site.asked


def test_images_are_spread_over_folders(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FOLDER_SIZE", 2)
    get(tsv(tmp_path, [("words", site.url("/png"))] * 5), tmp_path / "out")
    images = {record["image"] for record in lines(tmp_path / "out/records.jsonl")}
    assert images == {f"{row // 2:05d}/{row:09d}.png" for row in range(5)}


def test_goes_on_and_tries_failures_again_only_when_told(site: Site, tmp_path: Path):
    pairs = [("a", site.url("/png")), ("b", site.url("/later")), ("c", site.url("/jpeg")), ("d", site.url("/gif"))]
    table, output = tsv(tmp_path, pairs), tmp_path / "out"
    assert get(table, output, limit=3).failed == {"HTTP 404": 1}
    assert sorted(site.paths) == ["/jpeg", "/later", "/png"]
    site.asked.clear()
    site.page("/later", picture())
    assert get(table, output) == DownloadSummary(output, 3, {"HTTP 404": 1})
    assert site.paths == ["/gif"]
    assert get(table, output, retry_failed=True) == DownloadSummary(output, 4, {})
    assert site.paths == ["/gif", "/later"]
    assert sorted(ids(output)) == [0, 1, 2, 3]
    assert not reasons(output)
    assert get(table, output, retry_failed=True).got == 4
    assert len(site.asked) == 2


@pytest.mark.parametrize("torn", ['{"id": "000000002", "ima', '{"id": "000000002"}', "\0\0\0\n", '"id"\n', "[]\n"])
def test_a_torn_last_line_is_dropped(site: Site, tmp_path: Path, torn: str):
    table, output = tsv(tmp_path, [("words", site.url(path)) for path in ("/png", "/no", "/jpeg")]), tmp_path / "out"
    get(table, output, limit=2)
    for name in ("records.jsonl", "failures.jsonl"):
        with (output / name).open("a") as file:
            file.write(torn)
    get(table, output)
    assert ids(output) == [0, 2]
    assert reasons(output) == {1: "HTTP 404"}


def test_a_broken_line_before_the_end_is_an_error(site: Site, tmp_path: Path):
    table, output = tsv(tmp_path, [("words", site.url("/png"))]), tmp_path / "out"
    get(table, output)
    records = output / "records.jsonl"
    records.write_text("{broken\n" + records.read_text())
    with pytest.raises(ValueError, match=r"records\.jsonl: the line at byte 0 is broken"):
        get(table, output)


def test_killed_in_the_middle_it_goes_on(site: Site, tmp_path: Path):
    number = 60

    def slow(handler: Any):
        time.sleep(0.03)
        row = int(handler.path.split("=")[1])
        send(handler, 404) if row % 5 == 4 else send(handler, 200, picture("JPEG"))

    site.pages["/slow"] = slow
    table = tsv(tmp_path, [(f"words {row}", site.url(f"/slow?row={row}")) for row in range(number)])
    output = tmp_path / "out"
    words = [str(table), str(output), "--workers", "4", "--allow-private"]
    code = f"from vlm.data.tools.download import main; main({words!r})"
    for least in (10, 30):  # killed twice
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        while sum(1 for name in ("records", "failures") for _ in opened(output / f"{name}.jsonl")) < least:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {int(json.loads(line)["id"]) for line in opened(output / "records.jsonl") if line.endswith("\n")}
    assert 10 < len(done) < number
    site.asked.clear()
    main(words)
    asked = [int(path.split("=")[1]) for path in site.paths]
    assert len(asked) == len(set(asked))
    assert not set(asked) & done
    assert sorted([*ids(output), *reasons(output)]) == list(range(number))
    assert {row for row in range(number) if row % 5 == 4} == set(reasons(output))
    assert not (output / "partial").exists()
    assert sorted(path.name for path in (output / "images/00000").iterdir()) == [
        f"{row:09d}.jpg" for row in sorted(ids(output))
    ]


def opened(file: Path) -> list[str]:
    return file.read_text().splitlines(keepends=True) if file.exists() else []


def test_another_tables_folder_is_refused(site: Site, tmp_path: Path):
    table, output = tsv(tmp_path, [("words", site.url("/png"))]), tmp_path / "out"
    get(table, output)
    moved = table.rename(tmp_path / "moved.tsv")
    assert get(moved, output).got == 1  # the same, whatever its name
    other = tsv(tmp_path, [("words", site.url("/gif"))])
    with pytest.raises(ValueError, match=r"another table, captions\.tsv.*sha256_of_beginning"):
        get(other, output)
    other = tsv(tmp_path, [("words", site.url("/png"))] * 2)
    with pytest.raises(ValueError, match=r"size 3[0-9] there, 6[0-9] here"):
        get(other, output)


def test_other_columns_are_another_download(site: Site, tmp_path: Path):
    table, output = tmp_path / "t.csv", tmp_path / "out"
    table.write_text(f"url,short,long\n{site.url('/png')},a,b\n")
    get(table, output, caption_column="short")
    with pytest.raises(ValueError, match="caption_column short there, long here"):
        get(table, output, caption_column="long")


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "out/images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has images but no download\.json"):
        get(tsv(tmp_path, [("words", "http://example.com/")]), tmp_path / "out")


def test_two_at_once_are_refused(site: Site, tmp_path: Path):
    table, output = tsv(tmp_path, [("words", site.url("/png"))]), tmp_path / "out"
    get(table, output)
    with (output / "records.jsonl").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another download writes to"):
            get(table, output)
    assert get(table, output).got == 1


def test_takes_only_a_few_rows_ahead(tmp_path: Path):
    taken = 0

    def rows() -> Iterator[Row]:
        nonlocal taken
        for taken in range(1, 101):
            yield Row(taken - 1, "", "words")

    with DownloadWorkers(tmp_path, Options(workers=3)) as workers:
        for number, outcome in enumerate(workers.outcomes(rows()), start=1):
            assert outcome.reason == "no URL"
            assert taken < number + 6
    assert number == 100


def test_trouble_of_this_machine_ends_the_run(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, content: bytes):
        raise OSError(28, "No space left on device")

    table = tsv(tmp_path, [("words", site.url("/png"))] * 20)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            get(table, tmp_path / "out")
    assert get(table, tmp_path / "out").got == 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "a cat\thttp://example.com/1\n\nb\thttp://example.com/2\n"),
        ("a.tsv", "http://example.com/1\ta cat\r\nhttp://example.com/2\tb\r\n"),
        ("a.tsv", "\ufeffcaption\turl\na cat\thttp://example.com/1\nb\thttp://example.com/2"),
        ("a.CSV", "URL,width,TEXT\nhttp://example.com/1,3,a cat\nhttp://example.com/2,3,b\n"),
        ("a.csv", 'image_url,words\nhttp://example.com/1,"a cat"\nhttp://example.com/2,b\n'),
    ],
)
def test_columns_are_found(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert stream_table_rows(tmp_path / name) == [("http://example.com/1", "a cat"), ("http://example.com/2", "b")]
    assert Table(tmp_path / name, None, None).num_rows == 2


def test_columns_are_named(tmp_path: Path):
    table = tmp_path / "a.csv"
    table.write_text("one,two,three\nhttp://example.com/1,http://example.com/2,x\n")
    with pytest.raises(ValueError, match=r"--url-column='2': no such column; .* has one, two, three"):
        Table(table, "2", "3")
    assert stream_table_rows(table, "two", "three") == [("http://example.com/2", "x")]
    table.write_text("http://example.com/1,http://example.com/2,x\n")
    assert stream_table_rows(table, "2", "3") == [("http://example.com/2", "x")]


def test_quotation_marks_of_tsv_are_text_and_those_of_csv_are_not(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('"a" cat\thttp://example.com/1\n"b\thttp://example.com/2\n')
    assert [caption for _, caption in stream_table_rows(tmp_path / "a.tsv")] == ['"a" cat', '"b']
    (tmp_path / "a.csv").write_text('url,caption\nhttp://example.com/1,"a, ""b""\nc"\n')
    assert stream_table_rows(tmp_path / "a.csv") == [("http://example.com/1", 'a, "b"\nc')]


def test_parquet(site: Site, tmp_path: Path):
    table = tmp_path / "a.parquet"
    columns = {"width": [1, 2, 3], "url": [site.url("/png"), None, site.url("/gif")], "caption": ["a", "b", None]}
    pyarrow.parquet.write_table(pa.table(columns), table, row_group_size=2)
    assert stream_table_rows(table) == [(site.url("/png"), "a"), ("", "b"), (site.url("/gif"), "")]
    assert get(table, tmp_path / "out") == DownloadSummary(tmp_path / "out", 1, {"no URL": 1, "empty caption": 1})
    with pytest.raises(ValueError, match="column 'width' is of int64; it must be of strings"):
        stream_table_rows(table, None, "width")
    table.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        Table(table, None, None)


def test_bytes_that_are_no_utf8_are_the_trouble_of_their_row(site: Site, tmp_path: Path):
    table = tmp_path / "a.tsv"
    table.write_bytes(f"caf\xe9\t{site.url('/png')}\nb\t{site.url('/png')}\nlonely\n".encode("latin-1"))
    assert get(table, tmp_path / "out").failed == {"not UTF-8": 1, "no URL": 1}
    assert get(table, tmp_path / "out").got == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,c\n1,2,3\n", r"which column holds the urls\? .* has a, b, c; name it with --url-column"),
        ("url,b,c\n1,2,3\n", r"which column holds the captions\? .* has url, b, c; name it with --caption-column"),
        ("url,text,title\n", "which column holds the captions"),
        ("http://example.com/,http://example.com/,x\n", r"urls\? .* has no header, and in the first row 1 \(http"),
        ("http://example.com/,y,x\n", r"captions\? .*, 2 \(y\), 3 \(x\)"),
        ("", "urls.* has none"),
    ],
)
def test_columns_that_cannot_be_told(tmp_path: Path, content: str, message: str):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "a.csv", None, None)


def test_a_field_without_end_names_its_line(tmp_path: Path):
    (tmp_path / "a.csv").write_text('url,caption\nhttp://example.com/,"' + "a" * 200_000)
    with pytest.raises(ValueError, match=r"a\.csv, line 2: field larger"):
        stream_table_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "workers=0; allowed are 1 to 256"),
        ({"timeout": 0.0}, "timeout=0.0; allowed are 0.1"),
        ({"limit": 0}, "limit=0; allowed are 1 to"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_options_out_of_bounds(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Options(**change)


def test_main(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, output = tmp_path / "a.csv", tmp_path / "new/out"
    table.write_text(f"link,words,more\n{site.url('/png')},a,b\n{site.url('/no')},a,b\n{site.url('/gif')},a,b\n")
    words = [str(table), str(output), "--caption-column", "more", "--allow-private", "--limit", "2", "--workers", "2"]
    main(words)
    printed = capsys.readouterr()
    assert "1 images fetched, 1 failed" in printed.out
    assert "1  HTTP 404" in printed.out
    assert "--retry-failed" in printed.out
    assert "got=1" in printed.err
    assert lines(output / "records.jsonl")[0]["conversations"][1]["value"] == "b"
    main([*words, "--retry_failed"])
    assert site.paths.count("/no") == 2


@pytest.mark.parametrize(
    ("name", "message"), [("no.tsv", "No such file.*no.tsv"), ("a.json", r"ends in '.json'; a table is one of .csv")]
)
def test_main_says_what_is_wrong_with_the_table(tmp_path: Path, name: str, message: str):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit, match=f"vlm data download: .*{message}"):
        main([str(tmp_path / name), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_control_c_says_what_to_do(site: Site, tmp_path: Path):
    site.pages["/drip"] = lambda handler: (send(handler, 200, Content_Length="99999"), drip(handler, b"x", 0.05))[1]
    pairs = [("words", site.url("/png"))] * 3 + [("words", site.url("/drip"))] * 20
    words = [str(tsv(tmp_path, pairs)), str(tmp_path / "out"), "--allow-private", "--workers", "4", "--timeout", "600"]
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job may not be
    code = f"{listening}; from vlm.data.tools.download import main; main({words!r})"
    environment = {**os.environ, "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: len(site.asked) >= 7, process)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=HANG)  # the server goes on
    assert process.returncode == 130
    assert "the same command continues" in printed
    assert "Traceback" not in printed
