"""`vlm data show` and `vlm data stats`, as they are called: what a run would train on, and what it amounts to."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_parts import picture
from vlm.cli.main import main
from vlm.data.sample import ImageRef, Sample, ToolCallTurn, ToolResultTurn, Turn, VideoRef
from vlm.data.tools.show import describe_features


@pytest.fixture
def words(common: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The world's run, with a record added that is too long and one that cannot be used."""
    records = json.loads((world / "records.json").read_text())
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "long " * 400}]
    records += [{"id": "long", "conversations": turns}, {"id": "lost", "image": "no.png", "conversations": turns}]
    (tmp_path / "records.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    return ["-cn", "finetune-smol", *common, f"dataset.path={tmp_path / 'records.json'}"]


def test_records_are_shown_with_their_supervised_tokens_marked(words, tmp_path: Path, capsys):
    main(["data", "show", "--number", "2", "--output", "pages/a.html", *words])
    said = capsys.readouterr().out
    assert "records.json, record 0, id 0: " in said
    assert "supervised; 30×20" in said
    assert "[9 × image token]" in said
    assert "【a red square<|im_end|>】" in said
    assert "what is in this picture?" in said.replace("【", "").partition("a red square")[0]
    page = (tmp_path / "pages" / "a.html").read_text()
    assert page.count("<section>") == 2
    assert page.count('<img src="data:image/jpeg;base64,') == 2
    assert "<mark>a red square&lt;|im_end|&gt;</mark>" in page


def test_records_of_these_numbers_and_what_is_wrong_with_them(words, capsys):
    main(["data", "show", "--records", "3,25,24", *words])
    said = capsys.readouterr().out
    assert said.index("record 3") < said.index("record 25") < said.index("record 24")
    assert "cannot be used: image file" in said
    assert "no.png does not exist\n   Image paths are relative to dataset.image_folder" in said
    assert "tokens, at most 256 are allowed" in said
    with pytest.raises(SystemExit, match=r"vlm: --records 26: .*records.json has 26 records, numbered from 0"):
        main(["data", "show", "--records", "26", *words])


def test_records_of_another_form_end_with_an_error(words, tmp_path: Path, capsys):
    (tmp_path / "captions.csv").write_text("image,caption\na.png,A cat.\n")
    for tool, what in (("show", "these"), ("stats", "the")):
        with pytest.raises(SystemExit, match=f"vlm data {tool}: none of {what} records can be used"):
            main(["data", tool, *words, f"dataset.path={tmp_path / 'captions.csv'}"])
        said = capsys.readouterr().out
        assert "add dataset.format=caption" in said
        assert "supervised tokens" not in said  # a count of nothing
        assert "id ?" not in said
        assert "With images" not in said
    assert not (tmp_path / "stats.png").exists()
    assert not (tmp_path / "records.html").exists()


def test_the_reason_stands_above_the_keys_that_are_not_read(words, tmp_path: Path, capsys):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": "no.png", "mood": "x", "conversations": turns}, {"conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*words[:-1], f"dataset.path={tmp_path / 'rows.json'}"]
    main(["data", "show", "--output", "page.html", *words])
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    for text in (said, page):
        assert text.count("keys that are not read: mood") == 1
        assert text.index("cannot be used: image file") < text.index("keys that are not read: mood")
    assert "As a page: page.html" in said  # the one record that can be used shows no image
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(SystemExit, match="vlm data stats: none of the records can be used"):
        main(["data", "stats", *words])
    said = capsys.readouterr().out
    assert said.index("image file") < said.index("keys that are not read")


def test_both_sides_of_a_preference_are_shown(common: list[str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "what?", "chosen": "a red square", "rejected": "no <b>"}
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    words = [
        *common,
        "trainer.unfreeze.train_connector=true",
        "dataset.path=pairs.json",
        "dataset.image_folder=.",
        "dataset.template=chatml",
    ]
    main(["data", "show", "--output", "a.html", "-cn", "preference-smol", *words])
    said = capsys.readouterr().out
    assert "   chosen:\n" in said.partition("   rejected:\n")[0]
    assert "【a red square<|im_end|>】" in said
    assert "【no <b><|im_end|>】" in said
    assert said.count("supervised") == 2
    page = (tmp_path / "a.html").read_text()
    assert "<h3>chosen</h3>" in page
    assert "<mark>no &lt;b&gt;&lt;|im_end|&gt;</mark>" in page.partition("<h3>rejected</h3>")[2]
    main(["data", "show", "-cn", "preference-smol", *words, "trainer.preference.rejected_image=blank"])
    assert "the rejected side sees other images" in capsys.readouterr().out


def test_what_is_not_learned_of_a_record_is_told(words, tmp_path: Path, capsys):
    asked, bad = {"from": "human", "value": "what?"}, {"from": "gpt", "value": "bad reply", "weight": 0}
    good = {"from": "gpt", "value": "good reply", "mood": "x"}
    rows = [
        {"id": "a", "conversations": [asked, bad, asked, good], "dataset": "web"},
        {"id": "b", "conversations": [asked, good, asked, {"from": "gpt", "value": " "}], "url": ""},
        {"id": "c", "conversations": [asked, {"from": "gpt", "value": ""}]},
        {"id": "d", "conversations": [good, asked, good]},
        {"id": "e", "conversations": [asked, bad]},
        {"id": "f", "conversations": [asked, good], "audio": "a.wav"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*words[:-1], f"dataset.path={tmp_path / 'rows.json'}"]
    main(["data", "show", "--number", "6", "--output", "page.html", *words])
    said = capsys.readouterr().out
    assert "bad reply" in said
    assert "【bad reply" not in said
    assert said.count("【good reply") == 2
    assert said.count("replies that are not trained on: 1") == 2
    assert "keys that are not read: dataset, conversations[].mood" in said
    assert said.count("keys that are not read: conversations[].mood") == 2
    assert "keys that are not read: audio, conversations[].mood" in said
    reasons = ["its replies are blank", "it begins with the assistant", "weight 0 or loss false", "`audio` is not read"]
    for reason in reasons:
        assert reason in said
    assert "keys that are not read: dataset, conversations[].mood" in (tmp_path / "page.html").read_text()
    main(["data", "stats", *words])
    said = " ".join(capsys.readouterr().out.split())
    assert "usable 2 " in said
    assert "replies 2 " in said
    assert "replies that are not trained on (blank, weight 0, loss false) 4 " in said
    assert "keys that are not read: 4 conversations[].mood 1 dataset 1 audio" in said
    assert all(reason in said for reason in reasons)


def test_a_seed_draws_others(words, capsys):
    main(["data", "show", "--number", "3", "--seed", "1", *words])
    drawn = capsys.readouterr().out
    main(["data", "show", "--number", "3", "--seed", "2", *words])
    assert drawn != capsys.readouterr().out


def test_a_stream_is_shown_from_its_start(words, tmp_path: Path, capsys):
    picture().save(tmp_path / "a.png")
    record = {"image": "a.png", "caption": "a cat"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 5)
    stream = [f"dataset.path={tmp_path / 'a.jsonl'}", f"dataset.image_folder={tmp_path}", "dataset.format=caption"]
    stream += ["dataset.streaming=true", "trainer.max_steps=1", "trainer.train_sampling_strategy=random"]
    main(["data", "show", "--number", "2", *words, *stream])
    assert capsys.readouterr().out.count("【a cat<|im_end|>】") == 2


def test_what_the_records_amount_to(words, tmp_path: Path, capsys):
    main(["data", "stats", "--output", "pictures/stats.png", *words])
    said = " ".join(capsys.readouterr().out.split())
    for fact in ("records 26", "usable 25", "with images 18", "images 18", "replies 25", "longer than 256 tokens 1",
                 "does not exist"):  # fmt: skip
        assert fact in said, fact
    with Image.open(tmp_path / "pictures" / "stats.png") as drawn:
        assert drawn.width > 800


def test_the_prompts_and_labels_of_a_head(words, tmp_path: Path, capsys):
    """The prompt alone is what a head reads; nothing of it is supervised."""
    records = json.loads((tmp_path / "records.json").read_text())[:8]
    (tmp_path / "records.json").write_text(
        json.dumps([{**one, "label": index % 2} for index, one in enumerate(records)])
    )
    words = ["-cn", "head-binary", "model=composed", *words[2:], "trainer.unfreeze.train_connector=true"]
    main(["data", "show", "--records", "1", "--output", "a.html", *words])
    said = capsys.readouterr().out
    assert "tokens, label 1; 30×21" in said
    assert "what is in this picture?" in said
    assert "a blue square" not in said
    main(["data", "stats", "--output", "stats.png", *words])
    said = " ".join(capsys.readouterr().out.split())
    assert "most common labels of a head: 4 0 4 1" in said


def test_an_unknown_tool_is_refused_and_all_are_listed(capsys):
    with pytest.raises(SystemExit, match="vlm data shoe: no such tool"):
        main(["data", "shoe"])
    assert "download" in capsys.readouterr().out


def test_what_a_record_has_beside_texts_and_images_is_named():
    call = ToolCallTurn("assistant", ("",), weight=2.0, tool_calls=({"function": {"name": "f", "arguments": {}}},))
    frames = VideoRef(Path("0.png"), frames=(ImageRef(Path("0.png"), is_extracted=True),))
    turns = (Turn("user", (frames, "?")), call, ToolResultTurn("tool", ("a",)), Turn("assistant", ("b",), thinking="c"))
    assert describe_features(Sample("x", turns, references=("b", "c"), tools=({},))) == [
        "tools", "calls of tools", "results of tools", "thinking", "weights of replies", "several references",
        "videos of extracted frames",
    ]  # fmt: skip
    assert describe_features(Sample("x", (Turn("user", ("?",)), Turn("assistant", ("b",))))) == []


def test_objects_are_told_and_drawn(words, tmp_path: Path, capsys):
    picture(size=(100, 80)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhere?"}, {"from": "gpt", "value": "<objects>"}]
    objects = [{"label": "cat", "box": [10, 20, 50, 80]}, {"label": "dog", "point": [0.5, 0.5], "units": "share"}]
    rows = [{"id": "a", "image": "a.png", "objects": objects, "conversations": turns},
            {"id": "b", "image": "a.png", "objects": [{"box": [10, 20, 500, 80]}], "conversations": turns}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    keys = [f"dataset.path={tmp_path / 'rows.json'}", f"dataset.image_folder={tmp_path}", "dataset.coordinates=pixels"]
    main(["data", "show", *words, *keys])
    said = capsys.readouterr().out
    assert "【cat: [10, 20, 50, 80]\ndog: [50, 40]<|im_end|>】" in said
    assert "objects, written as pixels: cat [10, 20, 50, 80]; dog [50, 40]" in said
    assert "box [10, 20, 500, 80] is outside its image, which has 100×80 pixels" in said
    assert '<img style="height:auto' in (tmp_path / "records.html").read_text()
