"""`vlm data clean`: what goes, what stays as it was, and runs that go on where they were stopped."""

import base64
import json
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from tests import waiting
from tests.data.vision.test_similarity import scene
from tests.data.vision.test_video import write_video
from vlm.data.records.formats import read_caption
from vlm.data.sample import Sample
from vlm.data.tools.clean import CleanSummary, DuplicateFinder, clean, main, record_to_json_line
from vlm.data.tools.verdicts import CleanTask, RecordVerdict, image_pixel_digest

ROOT = Path(__file__).parents[3]


def drawn(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image that is no other's double."""
    image = Image.new("RGB", size, (seed % 256, 90, 200))
    image.putpixel((0, 0), (255, seed // 256, 0))
    return image


def caption(number: int, image: str, text: str = "a thing") -> dict[str, Any]:
    return {"id": f"r{number}", "image": image, "caption": text}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images `0.png` to `5.png`."""
    for number in range(6):
        drawn(number).save(tmp_path / f"{number}.png")
    return tmp_path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(folder: Path, records: list[Any]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def task(folder: Path, **rules: Any) -> CleanTask:
    return CleanTask(str(folder / "in.jsonl"), folder / "cache", **{"format": "caption", **rules})


def cleaned(folder: Path, records: list[Any], duplicates: str = "record", **rules: Any) -> CleanSummary:
    """Clean records in this process, to `out.jsonl`."""
    write(folder, records)
    return clean(task(folder, **rules), folder / "out.jsonl", duplicates=duplicates, workers=1)


def dropped(folder: Path) -> list[tuple[int, str]]:
    return [(line["record"], line["reason"]) for line in lines(folder / "out-dropped.jsonl")]


# What goes


def bomb() -> bytes:
    """A PNG that says it has 20000 x 20000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99)))
    framed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(kind: str) -> bytes:
    file = BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, kind)
    return file.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: encoded("JPEG")[:-600], "does not open"),
    "truncated.png": (lambda: encoded("PNG")[:-600], "does not open"),
    "empty.png": (lambda: b"", "the file is empty"),
    "page.jpg": (lambda: b"<html><body>404</body></html>", "'<html><body>40' (a web page"),
    "bomb.png": (bomb, "decompression bomb"),
}


def test_images_of_one_colour_are_counted_and_stay(folder: Path):
    """Among them those whose levels were lost: they may be meant, and may be a fault of whatever wrote them."""
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "red.png")
    Image.new("I;16", (64, 48), 7).save(folder / "flat.png")
    Image.fromarray(np.linspace(0, 1, 64, dtype="float32")[None].repeat(64, axis=0)).save(folder / "ramp.tiff")
    found = cleaned(
        folder, [caption(0, "0.png"), caption(1, "flat.png"), caption(2, "ramp.tiff"), caption(3, "red.png")]
    )
    assert (found.kept, found.uniform, found.first_uniform) == (4, 2, "record 1 ('r1')")
    assert "2 kept images are a single colour throughout, for example in record 1 ('r1')" in str(found)


@pytest.mark.parametrize("name", FILES)
def test_an_image_that_does_not_decode_goes(folder: Path, name: str):
    content, said = FILES[name]
    (folder / name).write_bytes(content())
    found = cleaned(folder, [caption(0, "0.png"), caption(1, name), caption(2, "1.png")])
    assert (found.kept, found.dropped) == (2, {"broken": 1})
    (line,) = lines(folder / "out-dropped.jsonl")
    assert (line["record"], line["id"], line["reason"], line["file"]) == (1, "r1", "broken", str(folder / name))
    assert said in line["detail"]


@pytest.mark.parametrize(
    ("size", "rules", "reason"),
    [
        ((28, 28), {}, None),
        ((27, 100), {}, "small"),
        ((100, 27), {}, "small"),
        ((27, 27), {"min_side": 27}, None),
        ((100, 100), {"min_side": 101}, "small"),
        ((200, 40), {}, None),
        ((200, 40), {"max_aspect": 5.0}, None),
        ((200, 40), {"max_aspect": 4.9}, "narrow"),
        ((40, 200), {"max_aspect": 4.9}, "narrow"),
    ],
)
def test_an_image_may_be_too_small_or_too_long(
    folder: Path, size: tuple[int, int], rules: dict[str, Any], reason: str | None
):
    drawn(9, size).save(folder / "shape.png")
    found = cleaned(folder, [caption(0, "shape.png")], **rules)
    assert found.dropped == ({reason: 1} if reason else {})
    if reason:
        assert f"shape.png is {size[0]} x {size[1]} pixels" in found.examples[reason]


@pytest.mark.parametrize("text", ["", " \n\t", "\u3000"])
def test_a_record_with_blank_replies_goes(folder: Path, text: str):
    assert cleaned(folder, [caption(0, "0.png", text)]).dropped == {"silent": 1}


def test_one_reply_that_says_something_is_enough(folder: Path):
    turns = [("human", "<image>\na?"), ("gpt", " "), ("human", "b?"), ("gpt", "yes")]
    record = {"id": "1", "image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert cleaned(folder, [record], format="llava").kept == 1


def test_what_is_not_learned_is_left_out_as_in_training(folder: Path):
    def record(*turns: tuple[str, str, dict[str, Any]], **keys: Any) -> dict[str, Any]:
        return {"id": "1", "conversations": [{"from": who, "value": text, **more} for who, text, more in turns], **keys}

    asked, bad, good = ("human", "a?", {}), ("gpt", "no", {"weight": 0}), ("gpt", "yes", {})
    rows = [record(asked, bad), record(good, asked, good), record(asked), record(asked, good, audio="a.wav")]
    assert cleaned(folder, rows, format="llava").dropped == {"refused": 2, "silent": 2}
    kept = [record(asked, bad, asked, good), record(asked, ("gpt", "no", {}), asked, good), record(asked, label=1)]
    write(folder, kept)
    assert clean(task(folder, format="llava"), folder / "kept.jsonl", workers=1).kept == 3


REFUSED = {
    "no caption": ({"id": "7", "image": "0.png"}, "`caption` must be a string", None),
    "no such file": (caption(7, "z.png"), "z.png does not exist", "z.png"),
    "an address": (caption(7, "https://example.com/a.png"), "download the image", "https://example.com/a.png"),
    "no mapping": ([1], "each record must be a JSON object, got list", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reader_refuses_goes(folder: Path, name: str):
    record, said, file = REFUSED[name]
    assert cleaned(folder, [record, caption(0, "0.png")]).dropped == {"refused": 1}
    (line,) = lines(folder / "out-dropped.jsonl")
    assert said in line["detail"]
    assert (line["record"], line["file"]) == (0, file)


def test_a_line_that_is_no_json_goes_alone(folder: Path):
    path = write(folder, [caption(0, "0.png"), caption(1, "1.png")])
    path.write_bytes(b'{"id": \n' + path.read_bytes())
    found = clean(task(folder), folder / "out.jsonl", workers=1)
    assert (found.kept, found.dropped) == (2, {"refused": 1})
    assert "record 0: not JSON" in found.examples["refused"]


def read_badly(record: Any, folder: Path) -> Sample:
    """A user's own reader, which trips over some records."""
    return read_caption(record, folder) if record["caption"] != "odd" else {}["odd"]


def test_what_a_reader_of_the_users_own_trips_over_goes(folder: Path):
    records = [caption(0, "0.png"), caption(1, "1.png", "odd")]
    found = cleaned(folder, records, format="tests.data.tools.test_clean:read_badly")
    assert found.examples["refused"].startswith(
        "record 1 ('r1'): its reader raised KeyError: 'odd' (test_clean.py, line "
    )


def test_an_image_that_cannot_be_turned_upright_goes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow writes what an image says of itself anew when it turns it, and trips over some of it."""

    def fail(image: Image.Image) -> Image.Image:
        raise struct.error("odd tag")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    found = cleaned(folder, [caption(0, "0.png")])
    assert "0.png cannot be turned upright and converted to RGB: odd tag" in found.examples["broken"]


def test_videos_are_opened_and_compared_by_their_files(folder: Path):
    whole = write_video(folder / "a.mp4", 3).read_bytes()
    (folder / "same.mp4").write_bytes(whole)
    (folder / "torn.mp4").write_bytes(whole[:-200])
    turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "that"}]
    records = [{"video": name, "conversations": turns} for name in ("a.mp4", "torn.mp4", "same.mp4")]
    cleaned(folder, records, format="llava")
    assert dropped(folder) == [(1, "broken"), (2, "duplicate")]


# Duplicates


def test_a_record_with_images_and_text_of_an_earlier_one_goes(folder: Path):
    same = [caption(0, "0.png"), caption(1, "0.png", "other"), caption(2, "0.png"), caption(3, "1.png")]
    assert cleaned(folder, same).examples == {"duplicate": "record 2 ('r2'): has the text and images of record 0"}
    assert [record["id"] for record in lines(folder / "out.jsonl")] == ["r0", "r1", "r3"]


KINDS = {"record": [(3, "duplicate")], "image": [(1, "duplicate"), (3, "duplicate"), (5, "duplicate")], "keep": []}


@pytest.mark.parametrize("duplicates", KINDS)
def test_duplicates_are_of_records_or_of_images(folder: Path, duplicates: str):
    """An image of a record that went has not been seen."""
    many = [("0.png", "a"), ("0.png", "b"), ("1.png", "a"), ("0.png", "a"), ("2.png", "c")]
    records = [caption(number, *given) for number, given in enumerate(many)]
    message = {"role": "user", "content": "<image><image>"}
    for images in (["2.png", "3.png"], ["3.png"]):
        text = {**message, "content": "<image>" * len(images)}
        records.append({"id": "m", "images": images, "messages": [text, {"role": "assistant", "content": "d"}]})
    cleaned(folder, records, duplicates, format="tests.data.tools.test_clean:read_either")
    assert dropped(folder) == KINDS[duplicates]
    assert lines(folder / "out.jsonl")[-1] == records[-1]


def test_near_copies_go_where_that_is_asked(folder: Path):
    """With the text of the record that they are of; or, by images, with any text. The log says what is like what."""
    scene(1).save(folder / "a.png")
    scene(2).save(folder / "b.png")
    scene(1).resize((120, 90)).save(folder / "near.jpg", quality=80)
    given = [("a.png", "x"), ("near.jpg", "x"), ("near.jpg", "y"), ("b.png", "x"), ("a.png", "x")]
    records = [caption(number, *values) for number, values in enumerate(given)]

    def cleaned(*args: Any, **rules: Any) -> None:
        """Clean again, in place of what was there."""
        write(folder, records)
        duplicates = args[0] if args else "record"
        clean(task(folder, **rules), folder / "out.jsonl", duplicates=duplicates, workers=1, force=True)

    cleaned()
    assert dropped(folder) == [(4, "duplicate")]
    cleaned(near_duplicates=True)
    assert dropped(folder) == [(1, "near"), (4, "duplicate")]
    told = f"has the text and images of record 0: {folder / 'near.jpg'} looks like {folder / 'a.png'}"
    assert lines(folder / "out-dropped.jsonl")[0]["detail"] == told
    cleaned("image", near_duplicates=True)
    assert dropped(folder) == [(1, "near"), (2, "near"), (4, "duplicate")]
    cleaned("keep", near_duplicates=True)
    assert dropped(folder) == []


def test_the_former_name_of_a_criterion_is_known(folder: Path):
    cleaned(folder, [caption(0, "0.png"), caption(1, "0.png", "other")], "picture")
    assert dropped(folder) == [(1, "duplicate")]


def read_either(record: Any, folder: Path) -> Sample:
    """Captions and messages in one file."""
    from vlm.data.records.conversations import read_messages

    return (read_messages if "messages" in record else read_caption)(record, folder)


def test_records_of_text_only_are_compared_too(folder: Path):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    records = [{"id": str(number), "messages": turns} for number in range(2)]
    for duplicates in ("record", "picture"):
        cleaned(folder, records, duplicates, format="messages")
        assert dropped(folder) == [(1, "duplicate")]
        (folder / "out.jsonl").unlink()


def test_the_place_of_an_image_in_the_text_counts(folder: Path):
    def record(text: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return {"image": "0.png", "messages": turns}

    assert cleaned(folder, [record("<image>a"), record("a<image>")], format="messages").kept == 2


def test_an_image_saved_in_another_way_is_the_same(folder: Path):
    drawn(0).save(folder / "loose.png", compress_level=0)
    drawn(0).convert("RGBA").save(folder / "alpha.png")
    drawn(0).quantize(4).save(folder / "palette.png")
    drawn(0).save(folder / "same.bmp")
    names = ["0.png", "loose.png", "alpha.png", "palette.png", "same.bmp", "1.png"]
    cleaned(folder, [caption(number, name) for number, name in enumerate(names)])
    assert [record["image"] for record in lines(folder / "out.jsonl")] == ["0.png", "1.png"]


def test_images_are_told_apart_by_what_is_shown():
    def turned(orientation: int) -> Image.Image:
        file, exif = BytesIO(), Image.Exif()
        exif[0x112] = orientation
        drawn().save(file, "PNG", exif=exif)
        return Image.open(file)

    grey = Image.new("L", (40, 30), 7)
    deep = [Image.new("I;16", (40, 30), value) for value in (60_000, 60_001)]
    tall = Image.new("RGB", (30, 600))
    changed = tall.copy()
    changed.putpixel((29, 599), (0, 0, 1))
    shown = [drawn(), turned(3), turned(6), drawn().convert("L"), grey, *deep, tall, changed, tall.transpose(2)]
    assert len({image_pixel_digest(image) for image in shown}) == len(shown)
    assert image_pixel_digest(turned(1)) == image_pixel_digest(drawn())
    assert image_pixel_digest(grey) == image_pixel_digest(grey.convert("RGB"))


def test_only_what_was_kept_has_been_seen():
    one, two, three = ("1" * 32, "2" * 32, "3" * 32)
    seen = DuplicateFinder("image")
    verdicts = [
        RecordVerdict("a", pictures=[one]), RecordVerdict("b", pictures=[one, two]),
        RecordVerdict("c", pictures=[two, two]),
        RecordVerdict("d", "broken", pictures=[three]), RecordVerdict("e", pictures=[three]),
    ]  # fmt: skip
    found = [seen.mark_duplicate(number, verdict).reason for number, verdict in enumerate(verdicts)]
    assert found == [None, "duplicate", None, "broken", None]


# What stays


def test_records_that_are_kept_are_as_they_were_and_in_order(folder: Path):
    records = [
        {**caption(number, f"{number}.png"), "more": {"number": 1.5, "list": [None, True]}, "text": text}
        for number, text in enumerate(("línea", "a\u2028b", "\ud83d", "日本", '"\\'))
    ]
    cleaned(folder, records)
    assert lines(folder / "out.jsonl") == records
    write_verdicts = (folder / "out.jsonl").read_bytes()
    assert "日本".encode() in write_verdicts
    assert write_verdicts.count(b"\n") == len(records)


def test_json_and_parquet_are_read_and_images_inline_become_addresses(folder: Path):
    content = (folder / "0.png").read_bytes()
    pictures = [{"bytes": content, "path": "x.png"}, {"bytes": b"", "path": None}, {"bytes": None, "path": "1.png"}]
    rows = [{"id": number, "image": given, "caption": "a"} for number, given in enumerate(pictures)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    table = CleanTask(str(folder / "in.parquet"), folder / "cache", format="caption")
    assert clean(table, folder / "out.jsonl", workers=1).dropped == {"broken": 1}
    first, last = lines(folder / "out.jsonl")
    assert first == {"id": 0, "image": f"data:image/png;base64,{base64.b64encode(content).decode()}", "caption": "a"}
    assert last["image"] == {"bytes": None, "path": "1.png"}
    again = CleanTask(str(folder / "out.jsonl"), folder / "cache", format="caption")
    assert clean(again, folder / "again.jsonl", workers=1).kept == 2
    assert lines(folder / "again.jsonl") == [first, last]


def test_what_json_cannot_hold_is_written_as_text():
    from datetime import date

    record = {"day": date(2020, 1, 2), "sound": {"bytes": b"RIFF", "path": None}, "raw": [b"\0"]}
    assert json.loads(record_to_json_line(record)) == {
        "day": "2020-01-02", "sound": "data:application/octet-stream;base64,UklGRg==",
        "raw": ["data:application/octet-stream;base64,AA=="],
    }  # fmt: skip


def test_an_option_of_the_format_is_json_or_text(folder: Path):
    records = [{"id": 1, "pic": "0.png", "caption": "a"}]
    assert cleaned(folder, records, options=("image_key=pic", 'prompt=["a", "b"]')).kept == 1
    with pytest.raises(ValueError, match=r"--option: .*'key'; --format caption has image_key, caption_key, prompt"):
        clean(task(folder, options=("key=x",)), folder / "other.jsonl", workers=1)


# Files that stand there


def test_an_output_that_exists_is_refused_unless_forced(folder: Path):
    cleaned(folder, [caption(0, "0.png")])
    write(folder, [caption(1, "1.png")])
    with pytest.raises(ValueError, match=r"out.jsonl exists; .* --force"):
        clean(task(folder), folder / "out.jsonl", workers=1)
    assert lines(folder / "out.jsonl") == [caption(0, "0.png")]
    clean(task(folder), folder / "out.jsonl", workers=1, force=True)
    assert lines(folder / "out.jsonl") == [caption(1, "1.png")]


@pytest.mark.parametrize("source", ["a.jsonl", "a-dropped.jsonl", "a.jsonl.journal.jsonl", "linked.jsonl"])
def test_the_input_is_never_written_over(folder: Path, source: str):
    before = write(folder, [caption(0, "0.png")]).rename(folder / source).read_bytes()
    output = folder / "a.jsonl"
    if source == "linked.jsonl":
        output.symlink_to(folder / source)
    with pytest.raises(ValueError, match=f"would overwrite the input .*{source}"):
        clean(CleanTask(str(folder / source), folder / "cache", format="caption"), output, force=True)
    assert (folder / source).read_bytes() == before


OUTPUTS = {
    "out.json": "the name must end in .jsonl",
    "none/out.jsonl": "there is no folder",
    "data/out.jsonl": "is inside the input",
    "data/deep/out.jsonl": "is inside the input",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_is_refused(folder: Path, name: str):
    (folder / "data" / "deep").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"OUTPUT .*{name}.*{OUTPUTS[name]}"):
        clean(CleanTask(str(folder / "data"), folder / "cache"), folder / name)


def test_nothing_but_the_results_is_left(folder: Path):
    cleaned(folder, [caption(0, "0.png")])
    names = {path.name for path in folder.iterdir() if path.suffix != ".png"}
    assert names == {"cache", "in.jsonl", "out.jsonl", "out-dropped.jsonl"}


def test_a_dry_run_writes_nothing(folder: Path):
    write(folder, [caption(0, "0.png"), caption(1, "0.png"), caption(2, "z.png")])
    found = clean(task(folder), folder / "out.jsonl", workers=1, dry_run=True)
    assert (found.records, found.kept, found.dropped) == (3, 1, {"refused": 1, "duplicate": 1})
    assert not list(folder.glob("out*"))


# Stopped and run again


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`vlm data clean` with the reader that kills, in a process of its own."""
    code = "import sys; from vlm.data.tools.clean import main; main(sys.argv[1:])"
    fixed = ["--format", "tests.data.tools.killing_reader:killer", "--cache-dir", str(folder / "cache")]
    command = [sys.executable, "-c", code, str(folder / "in.jsonl"), str(folder / "out.jsonl"), *fixed, *words]
    return waiting.run(command, cwd=ROOT)


def deadly(folder: Path, number: int, place: int) -> list[dict[str, Any]]:
    """Records of which one kills, and one more is a duplicate of an earlier one."""
    records = [caption(index, f"{index % 6}.png", f"text {index}") for index in range(number)]
    records[place]["caption"] = "deadly"
    records.append({**records[0], "id": "again"})
    write(folder, records)
    return records


def read_so_far(folder: Path) -> list[str]:
    return [line.split()[1] for line in (folder / "read.txt").read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_was(folder: Path):
    records = deadly(folder, 10, 5)
    (folder / "kill").write_text("self")
    assert start(folder, "--workers", "1").returncode == -signal.SIGKILL
    assert read_so_far(folder) == [f"r{index}" for index in range(6)]
    assert not (folder / "out.jsonl").exists()
    journal = folder / "out.jsonl.journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    assert len(whole) == 6
    journal.write_bytes(b"".join(whole)[:-20])
    (folder / "read.txt").unlink()
    again = start(folder, "--workers", "1")
    assert again.returncode == 0, again.stderr
    assert "4 of 11 records were checked before; continuing from there" in again.stdout
    assert read_so_far(folder) == [f"r{index}" for index in range(4, 10)] + ["again"]
    assert lines(folder / "out.jsonl") == records[:-1]
    assert dropped(folder) == [(10, "duplicate")]
    assert not journal.exists()


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_parent_and_a_killed_worker_is_told(folder: Path):
    records = deadly(folder, 40, 20)
    (folder / "kill").write_text("parent")
    assert start(folder, "--workers", "2").returncode == -signal.SIGKILL
    workers = {int(line.split()[0]) for line in (folder / "read.txt").read_text().splitlines()}
    waiting.wait_until(lambda: not any(map(alive, workers)))
    (folder / "kill").write_text("self")
    failed = start(folder, "--workers", "2")
    assert failed.returncode == 1
    assert "a worker was killed at record" in failed.stderr
    assert "fewer --workers" in failed.stderr
    assert start(folder, "--workers", "2").returncode == 0
    assert lines(folder / "out.jsonl") == records[:-1]
    assert dropped(folder) == [(40, "duplicate")]


def half_done(folder: Path, rules: CleanTask) -> None:
    """A run that stops at the fourth record."""
    with pytest.MonkeyPatch.context() as patch:
        opened = Image.open

        def stop(source: Any, **options: Any) -> Image.Image:
            if str(source).endswith("3.png"):
                raise KeyboardInterrupt
            return opened(source, **options)

        patch.setattr(Image, "open", stop)
        with pytest.raises(KeyboardInterrupt):
            clean(rules, folder / "out.jsonl", workers=1)


CHANGES = {
    "nothing": ({}, "3 of 6 records were checked before", True),
    "rules": ({"min_side": 29}, "min_side changed since that run was stopped; starting over", False),
    "image folder": (
        {"image_folder": "{folder}/copy"},
        "image_folder changed since that run was stopped; starting over",
        False,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_stopped_run_begins_anew_only_where_something_changed(folder: Path, name: str, capsys: Any):
    """That old verdicts count is seen from an image that breaks after it was looked at."""
    rules, said, kept = CHANGES[name]
    shutil.copytree(folder, folder / "copy")
    write(folder, [caption(number, f"{number}.png") for number in range(6)])
    half_done(folder, task(folder))
    for place in (folder, folder / "copy"):
        (place / "0.png").write_bytes(b"")
    rules = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in rules.items()}
    found = clean(task(folder, **rules), folder / "out.jsonl", workers=1)
    assert said in capsys.readouterr().out
    assert found.dropped == ({} if kept else {"broken": 1})


def test_a_changed_input_begins_anew(folder: Path, capsys: Any):
    records = [caption(number, f"{number}.png") for number in range(6)]
    write(folder, records)
    half_done(folder, task(folder))
    write(folder, records[::-1])
    assert clean(task(folder), folder / "out.jsonl", workers=1).kept == 6
    assert "the records changed since that run was stopped; starting over" in capsys.readouterr().out
    assert lines(folder / "out.jsonl") == records[::-1]


@pytest.mark.parametrize("rest", [b"", b'{"format"', b"\0\0\0\n"])
def test_a_journal_whose_first_line_is_torn_is_begun_anew(folder: Path, rest: bytes):
    (folder / "out.jsonl.journal.jsonl").write_bytes(rest)
    assert cleaned(folder, [caption(0, "0.png"), caption(1, "1.png")]).kept == 2


def test_two_runs_do_not_write_one_output(folder: Path):
    from filelock import FileLock

    with FileLock(folder / "out.jsonl.lock"), pytest.raises(ValueError, match=r"out.jsonl: another process is writing"):
        cleaned(folder, [caption(0, "0.png")])


# The command line


def test_the_command_line_says_what_came_out(folder: Path, capsys: Any):
    write(folder, [caption(0, "0.png"), caption(1, "0.png"), caption(2, "z.png"), caption(3, "y.png")])
    words = [str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--cache-dir", str(folder / "cache")]
    main([*words, "--format", "caption", "--workers", "1"])
    said = capsys.readouterr().out
    assert "4 records: 1 kept, 3 dropped" in said
    assert "refused           2  not a record of this format" in said
    assert "for example record 2 ('r2'): image file" in said
    assert "for example record 1 ('r1'): has the text and images of record 0" in said
    assert f"kept in {folder / 'out.jsonl'}, with image paths relative to {folder}" in said


WORDS = {
    "format": (["--format", "nonsense"], "dataset.format=nonsense"),
    "input": ([], "in.jsonl"),
    "workers": (["--workers", "0"], "'0': a whole number of at least 1 is needed"),
    "side": (["--min-side", "-3"], "'-3': a whole number of at least 1 is needed"),
    "aspect": (["--max-aspect", "0.5"], "--max-aspect 0.5: it is the longer side"),
    "duplicates": (["--duplicates", "some"], "allowed are record, image, keep"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_wrong_word_ends_it_with_what_is_allowed(folder: Path, name: str, capsys: Any):
    words, said = WORDS[name]
    with pytest.raises(SystemExit) as caught:
        main([str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--cache-dir", str(folder / "cache"), *words])
    assert said in f"{caught.value.code}{capsys.readouterr().err}"
