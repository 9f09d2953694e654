"""Writers: what is written is read back, appears when it is whole, and says what it cannot take."""

import json
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm.data.records.conversations import read_llava, read_messages
from vlm.data.records.formats import FORMATS
from vlm.data.records.open import open_records, stream_records
from vlm.data.sample import BadSample, ImageRef, Sample, ToolResultTurn, Turn, VideoRef
from vlm.data.tools import write
from vlm.data.tools.forms import FORMS, is_image_moved_by_llava, to_llava, to_messages
from vlm.data.tools.write import make_writer
from vlm.data.vision.images import open_media

COLOURS = {"a.png": (250, 0, 0), "deep/b.jpg": (0, 0, 250), "c.png": (0, 250, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with an image of one colour for each of `COLOURS`, and `film.mp4`."""
    images = tmp_path / "images"
    for name, colour in COLOURS.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(images / name)
    (images / "film.mp4").write_bytes(b"film")
    return images


def samples(folder: Path) -> list[Sample]:
    """What both forms can say: no, one and several images, their order, a system prompt, odd characters, a video."""
    a, b, c = (ImageRef(folder / name) for name in COLOURS)
    reply = Turn("assistant", ("Straße\n<image> 語",))
    return [
        Sample("1", (Turn("user", (a, "\nwhat?")), reply, Turn("user", ("and?",)), reply)),
        Sample("2", (Turn("system", ("Be brief.",)), Turn("user", ("hello",)), reply)),
        Sample("3", (Turn("user", ("one ", b, " two ", c, a)), reply, Turn("user", (b,)), Turn("assistant", ("",)))),
        Sample("4", (Turn("user", (VideoRef(folder / "film.mp4"), a, b, "\nwhat \\ \"now\"?")), reply)),
    ]  # fmt: skip


def written(output: str, folder: Path, records: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Records as they are read back."""
    with make_writer(output, folder, **options) as writer:
        for record in records:
            writer.write(record)
    return list(stream_records(output, folder.parent / "cache"))


def seen(sample: Sample) -> tuple[list[list[Any]], list[tuple[int, ...]]]:
    """Turns with a mark for each image, and the images' first pixels, to the nearest fifty."""
    turns = [[turn.role, *("picture" if isinstance(part, ImageRef) else part for part in turn.content)]
             for turn in sample.turns]  # fmt: skip
    pixels = [image.convert("RGB").getpixel((0, 0)) for image in open_media(sample)]
    return turns, [tuple(round(value / 50) for value in pixel) for pixel in pixels]  # pyright: ignore


# Forms


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_read_back_as_it_was(form: str, folder: Path):
    for sample in samples(folder):
        record = json.loads(json.dumps(FORMS[form](sample, folder)))
        assert FORMATS[form](record, folder) == sample


def test_forms_are_those_that_readers_know():
    assert set(FORMS) <= set(FORMATS)


def test_llava_records_look_as_llava_has_them(folder: Path):
    assert to_llava(samples(folder)[0], folder) == {
        "id": "1", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "Straße\n<image> 語"},
            {"from": "human", "value": "and?"}, {"from": "gpt", "value": "Straße\n<image> 語"},
        ],
    }  # fmt: skip
    assert to_llava(samples(folder)[2], folder)["image"] == ["deep/b.jpg", "c.png", "a.png", "deep/b.jpg"]


def test_messages_look_as_chat_templates_have_them(folder: Path):
    record = to_messages(samples(folder)[2], folder)
    assert list(record) == ["id", "images", "messages"]
    assert record["messages"][0] == {"role": "user", "content": [
        {"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": " two "}, {"type": "image"},
        {"type": "image"},
    ]}  # fmt: skip


def test_an_image_after_text_is_one_that_llava_moves(folder: Path):
    picture = ImageRef(folder / "a.png")
    sample = Sample("1", (Turn("user", ("what?", picture)), Turn("assistant", ("a cat",))))
    assert [is_image_moved_by_llava(turn) for turn in sample.turns] == [True, False]
    assert read_llava(to_llava(sample, folder), folder).turns[0].content == (picture, "\nwhat?")
    assert read_messages(to_messages(sample, folder), folder) == sample
    assert not any(is_image_moved_by_llava(turn) for sample in samples(folder) for turn in sample.turns)
    assert not is_image_moved_by_llava(ToolResultTurn("tool", ("seen: ", picture)))


@pytest.mark.parametrize("asked", ["what does <image> mean?", "<image> or <video>?"])
def test_a_word_that_is_no_mark_is_written_and_read_back(asked: str, folder: Path):
    shown = (ImageRef(folder / "a.png"), f"\n{asked}")
    for content in ((asked,), shown):
        sample = Sample("9", (Turn("user", content), Turn("assistant", ("an image",))))
        assert read_llava(to_llava(sample, folder), folder) == sample
        assert read_messages(to_messages(sample, folder), folder) == sample


@pytest.mark.parametrize("lead", [(), (ImageRef(Path("a.png")), ImageRef(Path("a.png")), "\nsee ")])
def test_text_that_llava_would_take_for_an_image_is_refused(lead: tuple[str | ImageRef, ...], folder: Path):
    media = tuple(part if isinstance(part, str) else ImageRef(folder / "a.png") for part in lead)
    text = "what?\n<image>" if not lead else "\nwhat does\n<image>\nmean?"
    sample = Sample("9", (Turn("user", (*media, text)), Turn("assistant", ("an image",))))
    with pytest.raises(BadSample, match="'9': its text has <image>"):
        to_llava(sample, folder)
    assert read_messages(to_messages(sample, folder), folder).turns[0].content[-1].endswith(text)


def test_a_reply_that_is_not_learned_is_written_and_read_back(folder: Path):
    turns = (Turn("user", ("a",)), Turn("assistant", ("b",), supervised=False), Turn("user", ("c",)))
    sample = Sample("9", (*turns, Turn("assistant", ("d",))))
    assert to_llava(sample, folder)["conversations"][1] == {"from": "gpt", "value": "b", "weight": 0}
    assert read_llava(to_llava(sample, folder), folder) == sample
    assert read_messages(to_messages(sample, folder), folder) == sample


def test_a_frame_has_no_name(folder: Path):
    sample = Sample("9", (Turn("user", (ImageRef(folder / "film.mp4", frame=3),)), Turn("assistant", ("a film",))))
    with pytest.raises(BadSample, match="frame 3 is not a file of its own"):
        to_llava(sample, folder)


# Files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet", "shards/", "shards/%05d.tar", "one.tar"])
def test_every_kind_of_file_is_read_back(name: str, form: str, folder: Path, tmp_path: Path):
    made = [FORMS[form](sample, folder) for sample in samples(folder)]
    found = written(f"{tmp_path}/{name.partition('%')[0]}", folder, made) if "%" not in name else None
    if found is None:
        with make_writer(f"{tmp_path}/{name}", folder, shard_size=3) as writer:
            for record in made:
                writer.write(record)
        assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["00000.tar", "00001.tar"]
        found = list(stream_records(f"{tmp_path}/shards/{{00000..00001}}.tar", tmp_path / "cache"))
    read = [FORMATS[form](record, folder) for record in found]
    assert [sample.id for sample in read] == ["1", "2", "3", "4"]
    if "tar" in name or "shards" in name:
        assert list(map(seen, read[:3])) == list(map(seen, samples(folder)[:3]))
        assert all(picture.content for sample in read for picture in sample.images)
        assert read[3].videos == samples(folder)[3].videos
    else:
        assert read == samples(folder)


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet"])
def test_records_are_opened_by_number(name: str, folder: Path, tmp_path: Path):
    written(f"{tmp_path}/{name}", folder, [to_llava(sample, folder) for sample in samples(folder)])
    records = open_records(f"{tmp_path}/{name}", tmp_path / "cache")
    assert [read_llava(records[index], folder) for index in range(len(records))] == samples(folder)


def test_parquet_holds_images(folder: Path, tmp_path: Path):
    made = [to_llava(sample, folder) for sample in samples(folder)[:3]]
    found = written(f"{tmp_path}/out.parquet", folder, made, embed_images=True)
    assert found[0]["images"][0] == {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    assert [seen(read_llava(record, tmp_path / "nowhere")) for record in found] == list(map(seen, samples(folder)[:3]))


def test_images_that_are_held_as_bytes_stay(folder: Path, tmp_path: Path):
    held = [{"bytes": (folder / name).read_bytes(), "path": None} for name in COLOURS]
    record = {"id": "1", "image": held, "conversations": [
        {"from": "human", "value": "<image><image><image>"}, {"from": "gpt", "value": "three"},
    ]}  # fmt: skip
    expected = seen(read_llava(record, folder))
    outputs = {"out.jsonl": {}, "out.json": {}, "out.parquet": {"embed_images": True}, "shards/": {}}
    for name, options in outputs.items():
        found = written(f"{tmp_path}/{name}", folder, [record], **options)
        assert seen(read_llava(found[0], folder)) == expected
    with pytest.raises(BadSample, match="are bytes, not files; --embed-images"):
        written(f"{tmp_path}/paths.parquet", folder, [record])


def test_many_images_of_a_tar_sample_keep_their_order(folder: Path, tmp_path: Path):
    names = ["a.png", "deep/b.jpg"] * 6
    record = {"id": "1", "image": names, "conversations": [
        {"from": "human", "value": "<image>" * 12}, {"from": "gpt", "value": "twelve"},
    ]}  # fmt: skip
    [found] = written(f"{tmp_path}/shards/", folder, [record])
    assert seen(read_llava(found, folder)) == seen(read_llava(record, folder))


def test_tar_shards_are_the_same_bytes_each_time(folder: Path, tmp_path: Path):
    made = [to_llava(sample, folder) for sample in samples(folder)]
    for name in ("one", "two"):
        written(f"{tmp_path}/{name}/", folder, made, shard_size=2)
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == ["shard-000000.tar", "shard-000001.tar"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    with tarfile.open(files[0][1]) as shard:
        assert shard.getnames()[:2] == ["000000002.json", "000000002.000.jpg"]


def test_parquet_is_written_in_groups(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 2)
    made = [to_llava(samples(folder)[index], folder) for index in (1, 1, 0, 2, 1)]
    written(f"{tmp_path}/out.parquet", folder, made)  # the first group has no pictures
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3
    with pytest.raises(
        ValueError, match=r"one of the 2 records from 3 on .*score.*\.jsonl file can have records with any"
    ):
        written(f"{tmp_path}/other.parquet", folder, [*made[:3], {**made[3], "score": 0.5}])
    with pytest.raises(ValueError, match="records from 3 on"):
        written(f"{tmp_path}/other.parquet", folder, [{"score": 1}, {"score": 2}, {"score": 0.5}])
    assert [file.name for file in tmp_path.glob("*.parquet*")] == ["out.parquet"]


def test_parquet_takes_no_mixture_of_types(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="2 records from 1 on does not fit into a table"):
        written(f"{tmp_path}/out.parquet", folder, [{"id": "1", "score": 1}, {"id": "2", "score": "high"}])


def test_dates_are_text_in_json(folder: Path, tmp_path: Path):
    assert written(f"{tmp_path}/out.jsonl", folder, [{"day": date(2024, 2, 29)}]) == [{"day": "2024-02-29"}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "7", "score": float("nan")}, "JSON cannot hold it"),
        ({"id": "7", "extra": b"123"}, "JSON cannot hold it: bytes"),
        ({"id": "7", "text": "\ud83d"}, "surrogate"),
        ({"id": "7", "image": {"bytes": b"123"}}, "one of its images does not open"),
    ],
)
def test_what_json_cannot_hold_leaves_no_trace(record: dict[str, Any], reason: str, folder: Path, tmp_path: Path):
    for name in ("out.jsonl", "out.json"):
        with make_writer(f"{tmp_path}/{name}", folder) as writer:
            with pytest.raises(BadSample, match=reason) as caught:
                writer.write(record)
            assert caught.value.sample_id == "7"
            writer.write({"id": "8"})
            assert writer.number == 1
        assert list(stream_records(f"{tmp_path}/{name}", tmp_path / "cache")) == [{"id": "8"}]


def stop(output: str, folder: Path, record: dict[str, Any], **options: Any) -> None:
    """Begin to write, and stop."""
    writer = make_writer(output, folder, **options)
    with pytest.raises(KeyboardInterrupt), writer:  # noqa: PT012, the interruption comes within
        writer.write(record)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet", "shards/", "shards/%06d.tar", "one.tar"])
def test_a_stopped_writer_leaves_what_was_there(name: str, folder: Path, tmp_path: Path):
    output, record = f"{tmp_path}/new/{name}", to_llava(samples(folder)[0], folder)
    stop(output, folder, record)
    assert not [file for file in (tmp_path / "new").rglob("*") if file.is_file()]
    with make_writer(output, folder) as writer:
        writer.write(record)
    [file] = [file for file in (tmp_path / "new").rglob("*") if file.is_file()]
    before = file.read_bytes()
    with pytest.raises(ValueError, match="exists; choose another output, or replace it with --force"):
        make_writer(output, folder)
    stop(output, folder, to_llava(samples(folder)[2], folder), force=True)
    assert file.read_bytes() == before
    with make_writer(output, folder, force=True) as writer:
        writer.write(to_llava(samples(folder)[2], folder))
    assert file.read_bytes() != before


def test_fewer_shards_replace_more(folder: Path, tmp_path: Path):
    made = [to_llava(sample, folder) for sample in samples(folder)]
    output = f"{tmp_path}/shards/part-%04d.tar"
    for number in (4, 2):
        with make_writer(output, folder, shard_size=1, force=True) as writer:
            for record in made[:number]:
                writer.write(record)
    assert sorted(file.name for file in (tmp_path / "shards").iterdir()) == ["part-0000.tar", "part-0001.tar"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet", "shards/"])
def test_no_records_make_no_file(name: str, folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="there are no records"), make_writer(f"{tmp_path}/{name}", folder):
        pass
    assert not [file for file in tmp_path.rglob("out*") if file.is_file()]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.txt", {}, r"out\.txt: allowed are NAME\.jsonl"),
        ("images", {}, "allowed are NAME"),
        ("out.jsonl", {"embed_images": True}, "--embed-images: it is for .parquet"),
        ("out.json", {"shard_size": 5}, "--shard-size: only FOLDER/"),
        ("one.tar", {"shard_size": 5}, "--shard-size: only FOLDER/"),
        ("shards/", {"shard_size": 0}, "--shard-size=0: it must be at least 1"),
        ("%06d-%06d.tar", {}, "the only % must be the number of the shard"),
        ("%06s.tar", {}, "the only % must be the number of the shard"),
        ("%06d/out.tar", {}, "the only % must be the number of the shard"),
    ],
)
def test_names_and_options_that_do_not_fit(
    name: str, options: dict[str, Any], message: str, folder: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        make_writer(f"{tmp_path}/{name}", folder, **options)


def test_a_folder_with_the_name_of_a_file_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(ValueError, match="exists"):
        make_writer(f"{tmp_path}/out.json", folder)
    with pytest.raises(ValueError, match="is a folder; for tar shards in it, write"):
        make_writer(f"{tmp_path}/out.json", folder, force=True)
