"""`vlm data convert`: a small input of every kind, read back as the conversation that it is."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_parts import picture
from vlm.data.records.formats import FORMATS
from vlm.data.records.open import open_records, stream_records
from vlm.data.sample import BadSample, ImageRef, Sample, Turn
from vlm.data.tools import convert, exports
from vlm.data.tools.convert import CONVERSIONS, OPTIONS, keyword_parameters, main
from vlm.data.tools.corpora import SHORT_ANSWER, make_image_namer
from vlm.data.tools.forms import FORMS

OUTPUT_NAMES = ("a.png", "b.png", "deep/c.png", "form.jpg", "00000/000000000.jpg", "00000/000000002.webp",
         "00001/000010000.png",
         "COCO_train2014_000000000042.jpg", "COCO_train2014_000000000043.jpg", "7/upload-d.png", "e f.png")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folder `images`."""
    for name in OUTPUT_NAMES:
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture().save(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, content: Any) -> str:
    """A file: text as it stands, or JSON, one record a line in `.jsonl`."""
    if not isinstance(content, str):
        lines = name.endswith(".jsonl")
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    Path(name).write_text(content, encoding="utf-8")
    return name


def run(source: str, output: str, *options: str) -> list[Any]:
    """Convert, with images in `images`; what was written."""
    main([source, output, "--image-folder", "images", "--cache-dir", "cache", *options])
    return list(stream_records(output, Path("cache")))


def talk(record: Any, form: str = "llava") -> list[tuple[str, ...]]:
    """The turns of a record, `[name]` for each image."""
    sample = FORMATS[form](record, Path("images"))
    return [tuple(part if isinstance(part, str) else marked(part) for part in turn.content) for turn in sample.turns]


def marked(part: Any) -> str:
    return f"[{part.path.relative_to('images')}]"


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error that a conversion ends with; it leaves nothing behind."""
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([*words, "--image-folder", "images", "--cache-dir", "cache"])
    left = {file for file in set(Path().rglob("*")) - before if "cache" not in file.parts}
    assert not [file for file in left if file.is_file()]
    capsys.readouterr()
    return str(caught.value)


def asked(question: str, answer: str, **others: Any) -> dict[str, Any]:
    """A record of LLaVA's form."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **others}


LLAVA = [
    asked("<image>\nwhat is it?", "a cat", id="1", image="a.png", kind="animal"),
    asked("hello", "Straße 語", id="2"),
    asked("one <image> two <image>", "yes", id="3", image=["deep/c.png", "a.png"]),
    {"id": "4", "image": "b.png", "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"},
        {"from": "human", "value": "<image>\nand this?"}, {"from": "gpt", "value": "a dog"},
    ]},
]  # fmt: skip


# LLaVA's form and messages


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet"])
def test_llava_to_messages_and_back_is_the_same(name: str, folder: Path):
    source = put("in.json", LLAVA)
    found = run(source, name, "--to", "messages")
    assert [talk(record, "messages") for record in found] == [talk(record) for record in LLAVA]
    assert run(name, "back.jsonl") == LLAVA


def test_messages_to_llava_and_back_is_the_same(folder: Path):
    messages = run(put("in.jsonl", LLAVA), "messages.jsonl", "--to", "messages")
    assert run("messages.jsonl", "llava.json") == LLAVA
    assert run("llava.json", "again.jsonl", "--to", "messages") == messages


def test_interleaved_messages_keep_their_order(folder: Path, capsys: pytest.CaptureFixture[str]):
    content = [{"type": "text", "text": "first"}, {"type": "image", "path": "b.png"}, {"type": "text", "text": "then"},
               {"type": "image"}, {"type": "image_url", "image_url": {"url": "deep/c.png"}}]  # fmt: skip
    reply = {"role": "assistant", "content": "yes"}
    alone = [{"type": "text", "text": "what?"}, {"type": "image"}]
    records = [{"id": "1", "images": ["a.png"], "messages": [{"role": "user", "content": content}, reply]},
               {"id": "2", "images": ["a.png"], "messages": [{"role": "user", "content": alone}, reply]}]  # fmt: skip
    [first, second] = run(put("in.jsonl", records), "same.jsonl", "--to", "messages")
    assert first["images"] == ["b.png", "a.png", "deep/c.png"]
    assert talk(first, "messages") == [("first", "[b.png]", "then", "[a.png]", "[deep/c.png]"), ("yes",)]
    assert talk(second, "messages") == [("what?", "[a.png]"), ("yes",)]
    assert "LLaVA" not in capsys.readouterr().out
    [first, second] = run("in.jsonl", "llava.jsonl")
    assert first["conversations"][0]["value"] == "first<image>then<image><image>"
    assert second["conversations"][0]["value"] == "what?<image>"
    assert "1 turns have their only image after text, which LLaVA's form" in capsys.readouterr().out


def test_messages_under_another_key(folder: Path):
    record = {"chat": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "score": 1}
    [found] = run(put("in.jsonl", [record]), "out.jsonl", "--from", "messages", "--option", "key=chat")
    assert found == {"id": "0", "score": 1, **asked("hi", "ho")}


def test_containers_follow_one_another(folder: Path):
    expected = [talk(record) for record in LLAVA]
    run(put("in.jsonl", LLAVA), "one.parquet", "--embed-images", "--to", "messages")
    run("one.parquet", "shards/", "--shard-size", "3")
    assert [file.name for file in sorted(Path("shards").iterdir())] == ["shard-000000.tar", "shard-000001.tar"]
    found = run("shards", "out.jsonl")
    assert [record["id"] for record in found] == ["1", "2", "3", "4"]
    assert found[0]["kind"] == "animal"
    assert found[0]["image"].startswith("data:image/png;base64,")
    turns = [FORMATS["llava"](record, folder).turns for record in found]
    shapes = [[len(turn.content) for turn in one] for one in turns]
    assert shapes == [[len(turn) for turn in one] for one in expected]
    assert len(open_records("out.jsonl", Path("cache"))) == 4


# Tables


def test_captions_of_a_table(folder: Path):
    put("in.csv", 'image,caption,width\na.png,"a cat, asleep",8\nb.png,a dog,8\n')
    [cat, dog] = run("in.csv", "out.jsonl")
    assert [cat["id"], dog["id"]] == ["0", "1"]
    assert talk(cat) == [("[a.png]",), ("a cat, asleep",)]
    [cat, dog] = run("in.csv", "out.json", "--prompt", "Describe it.")
    assert talk(dog) == [("[b.png]", "\nDescribe it."), ("a dog",)]
    assert sorted(dog) == ["conversations", "id", "image"]


def test_columns_of_other_names(folder: Path):
    put("in.tsv", "file\ttext\na.png\ta cat\n")
    options = ("--from", "caption", "--option", "image_key=file", "--option", "caption_key=text")
    [found] = run("in.tsv", "out.jsonl", *options, "--option", 'prompt=["Say what it is."]')
    assert talk(found) == [("[a.png]", "\nSay what it is."), ("a cat",)]


def test_questions_of_a_table(folder: Path):
    rows = [{"id": 5, "image": {"bytes": None, "path": "a.png"}, "question": "what?", "answer": 1,
             "choices": ["a dog", "a cat"]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    [found] = run("in.parquet", "out.jsonl", "--option", "choice_instruction=Letter:")
    assert talk(found) == [("[a.png]", "\nwhat?\nA. a dog\nB. a cat\nLetter:"), ("B",)]


# Data sets


@pytest.mark.parametrize("columns", [(0, 1), (1, 0)])
def test_conceptual_captions(columns: tuple[int, int], folder: Path, capsys: pytest.CaptureFixture[str]):
    captions = ['a "cat ', "lost", "a dog", *(f"row {row}" for row in range(3, 10_001))]
    rows = [(caption, f"https://example.com/{row}") for row, caption in enumerate(captions)]
    lines = ["\t".join(row[column] for column in columns) for row in rows]
    found = run(put("in.tsv", "\n".join(lines) + "\n"), "out.jsonl", "--prompt", "Describe it.")
    assert [record["id"] for record in found] == ["000000000", "000000002", "000010000"]
    assert [talk(record) for record in found] == [
        [("[00000/000000000.jpg]", "\nDescribe it."), ('a "cat',)],
        [("[00000/000000002.webp]", "\nDescribe it."), ("a dog",)],
        [("[00001/000010000.png]", "\nDescribe it."), ("row 10000",)],
    ]
    told = capsys.readouterr().out
    assert told == ("3 records written to out.jsonl, with image paths relative to images; "
                    "left out: 9998 rows without an image\n")  # fmt: skip


def test_conceptual_captions_with_a_bad_row(folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("in.tsv").write_bytes(b"a c\xe4t\thttps://example.com/0\nlost\n\na dog\thttps://example.com/2\n")
    words = ("in.tsv", "out.jsonl", "--from", "conceptual-captions")
    assert "record 0 ('000000000'): turn 2 (assistant) has half of a surrogate pair, as of" in fails(capsys, *words)
    assert [record["id"] for record in run(*words, "--on-bad", "skip")] == ["000000002"]


def test_conceptual_captions_with_a_header(folder: Path, capsys: pytest.CaptureFixture[str]):
    put(
        "in.csv",
        "where,said,source\nhttps://example.com/0,,x\nhttps://example.com/1,lost,x\nhttps://example.com/2,a dog,x\n",
    )
    words = ("in.csv", "out.jsonl", "--from", "conceptual-captions")
    assert "which column holds the urls?" in fails(capsys, *words)
    [found] = run(*words, "--url-column", "where", "--caption-column", "said")
    assert talk(found) == [("[00000/000000002.webp]",), ("a dog",)]
    assert "left out: 1 rows without a caption; left out: 1 rows without an image" in capsys.readouterr().out


def test_coco_captions(folder: Path):
    names = ["COCO_train2014_000000000042.jpg", "COCO_train2014_000000000043.jpg"]
    content = {
        "info": {"year": 2014}, "licenses": [],
        "images": [{"id": 42 + place, "file_name": name, "height": 8} for place, name in enumerate(names)],
        "annotations": [{"image_id": 43, "id": 1, "caption": "a dog "}, {"image_id": 42, "id": 2, "caption": "a cat"},
                        {"image_id": 43, "id": 3, "caption": "one dog"}],
    }  # fmt: skip
    found = run(put("captions_train2014.json", content), "out.jsonl")
    assert [record["id"] for record in found] == ["1", "2", "3"]
    assert [talk(record) for record in found] == [
        [(f"[{names[1]}]",), ("a dog",)], [(f"[{names[0]}]",), ("a cat",)], [(f"[{names[1]}]",), ("one dog",)],
    ]  # fmt: skip


def test_coco_captions_that_are_bad(folder: Path, capsys: pytest.CaptureFixture[str]):
    images = [{"id": 1, "file_name": "a.png"}]
    bad = [
        {"image_id": 2, "id": 7, "caption": "x"},
        {"image_id": 1, "id": 8, "caption": "a cat"},
        {"image_id": 1, "id": 9},
    ]
    source = put("in.json", {"images": images, "annotations": bad})
    assert "record 0 ('7'): image_id=2 is none of `images`" in fails(capsys, source, "out.jsonl")
    assert [record["id"] for record in run(source, "out.jsonl", "--on-bad", "skip")] == ["8"]
    skipped = [json.loads(line) for line in Path("out.jsonl.skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"record": 0, "id": "7", "reason": "image_id=2 is none of `images`"},
        {"record": 2, "id": "9", "reason": "Object missing required field `caption`"},
    ]
    put("other.json", {"images": 5, "annotations": []})
    assert "other.json: not what is converted here" in fails(capsys, "other.json", "x.json", "--from", "coco-captions")


def vqa_files() -> tuple[str, ...]:
    """Questions about two images, one of which has no answer, and the options that they need."""
    texts = {420: (42, "Is it red?"), 430: (43, "What is it?"), 421: (42, "How many?"), 422: (42, "Where?")}
    put("questions.json", {"task_type": "Open-Ended", "questions": [
        {"question_id": key, "image_id": image, "question": text} for key, (image, text) in texts.items()
    ]})  # fmt: skip
    people = [{"answer": "2", "answer_id": 1}, {"answer": "3", "answer_id": 2}, {"answer": "3", "answer_id": 3}]
    put("annotations.json", {"annotations": [
        {"question_id": 421, "image_id": 42, "answers": people},
        {"question_id": 420, "multiple_choice_answer": "yes", "answers": people},
        {"question_id": 430, "multiple_choice_answer": "a dog"}, {"question_id": 422, "answers": []},
    ]})  # fmt: skip
    return ("--annotations", "annotations.json", "--image-pattern", "COCO_train2014_{image_id:012d}.jpg")


def test_vqa_is_grouped_by_image(folder: Path, capsys: pytest.CaptureFixture[str]):
    options = vqa_files()
    found = run("questions.json", "out.jsonl", *options)
    assert [record["id"] for record in found] == ["42", "43"]
    assert [talk(record) for record in found] == [
        [("[COCO_train2014_000000000042.jpg]", f"\nIs it red?\n{SHORT_ANSWER}"), ("yes",), ("How many?",), ("3",)],
        [("[COCO_train2014_000000000043.jpg]", f"\nWhat is it?\n{SHORT_ANSWER}"), ("a dog",)],
    ]
    assert "left out: 1 questions without an answer" in capsys.readouterr().out


def test_vqa_one_record_a_question(folder: Path):
    options = vqa_files()
    found = run("questions.json", "out.jsonl", *options, "--no-group", "--instruction", "Briefly.")
    assert [record["id"] for record in found] == ["420", "430", "421"]
    assert talk(found[2]) == [("[COCO_train2014_000000000042.jpg]", "\nHow many?\nBriefly."), ("3",)]
    found = run("questions.json", "bare.jsonl", *options, "--no-group", "--instruction", "")
    assert talk(found[0])[0][1] == "\nIs it red?"


@pytest.mark.parametrize(
    "pattern",
    ["a.jpg", "{}.jpg", "{0}.jpg", "{name}.jpg", "{image_id}{x}", "{image_id.__class__}", "{image_id", "{image_id:q}"],
)
def test_image_patterns_are_checked_at_once(pattern: str):
    with pytest.raises(ValueError, match=r"--image-pattern .*the field image_id and no other"):
        make_image_namer(pattern)


def test_image_patterns(folder: Path):
    assert make_image_namer("{image_id:05d}.jpg")(12) == "00012.jpg"
    assert make_image_namer("x/{image_id}.jpg")("ab") == "x/ab.jpg"
    with pytest.raises(BadSample, match="image_id='ab' does not fit"):
        make_image_namer("{image_id:05d}.jpg")("ab")


def test_vqa_annotations_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]):
    options = vqa_files()
    put("annotations.json", {"annotations": [{"question_id": 420}, {"image_id": 42}]})
    assert "annotations.json: annotation 2: Object missing" in fails(capsys, "questions.json", "x.json", *options)
    put("annotations.json", "")
    assert "annotations.json: the file is empty" in fails(capsys, "questions.json", "x.json", *options)


# Annotation tools

FORM = "Name: Ada Lovelace Date: 10 December 1815 Signature:"


def span(text: str, label: str, token_start: int, token_end: int, **others: Any) -> dict[str, Any]:
    """An entity of UBIAI's."""
    start = FORM.index(text)
    return {"text": text, "start": start, "end": start + len(text), "token_start": token_start, "token_end": token_end,
            "entityLabel": label, **others}  # fmt: skip


def document(**others: Any) -> dict[str, Any]:
    """A document of UBIAI's: a name in two parts, a date, a question without an answer."""
    tokens = [
        span("Date:", "QUESTION", 4, 5), span("Lovelace", "ANSWER", 3, 3), span("Name:", "QUESTION", 0, 1),
        span("Ada", "ANSWER", 2, 2), span("10 December 1815", "ANSWER", 6, 8), span("Signature:", "QUESTION", 9, 10),
    ]  # fmt: skip
    links = [(0, 3), (2, 0), (4, 6), (6, 4)]  # heads are questions or answers; one is there both ways
    relations = [{"head": head, "child": child, "relationLabel": "ANSWERS"} for head, child in links]
    return {"documentName": "form.jpg", "document": FORM, "tokens": tokens, "relations": relations, **others}


EXPECTED_FORM = [("[form.jpg]", "\nName:"), ("Ada Lovelace",), ("Date:",), ("10 December 1815",)]


def test_ubiai(folder: Path, capsys: pytest.CaptureFixture[str]):
    [found] = run(put("in.json", [document(), document(relations=[])]), "out.jsonl")
    assert found["id"] == "form.jpg"
    assert talk(found) == EXPECTED_FORM
    told = capsys.readouterr().out
    assert "left out: 4 questions without an answer; left out: 1 documents without an answered question" in told


def by_start(value: dict[str, Any]) -> dict[str, Any]:
    places = {token["token_start"]: token["start"] for token in value["tokens"]}
    return renamed(value, places)


def by_last_token(value: dict[str, Any]) -> dict[str, Any]:
    places = {token["token_start"]: token["token_end"] for token in value["tokens"]}
    return renamed(value, places)


def by_id(value: dict[str, Any]) -> dict[str, Any]:
    places = {token["token_start"]: f"e{number}" for number, token in enumerate(value["tokens"])}
    for number, token in enumerate(value["tokens"]):
        token["id"] = f"e{number}"
    return renamed(value, places)


def renamed(value: dict[str, Any], places: dict[int, Any]) -> dict[str, Any]:
    value["relations"] = [{"head": places[one["head"]], "child": places[one["child"]], "relation": "x"}
                          for one in value["relations"]]  # fmt: skip
    return value


def other_names(value: dict[str, Any]) -> dict[str, Any]:
    words = [{"text": word, "id": number} for number, word in enumerate(FORM.split())]
    for token in value["tokens"]:
        token["label"] = token.pop("entityLabel")
        token["text"] = None
    return {**value, "entities": value["tokens"], "tokens": words}


def of_a_pdf(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "documentName": "form.pdf"}


@pytest.mark.parametrize("variant", [by_start, by_last_token, by_id, other_names, of_a_pdf])
def test_variants_of_ubiai(variant: Callable[[dict[str, Any]], dict[str, Any]], folder: Path):
    [found] = run(put("in.jsonl", [variant(document())]), "out.jsonl")
    assert talk(found) == EXPECTED_FORM


def test_labels_of_ubiai(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = json.dumps([document()]).replace("QUESTION", "Key").replace("ANSWER", "Value")
    [found] = run(put("in.json", text), "out.jsonl", "--question-label", "Key", "--answer-label", "Value")
    assert talk(found) == EXPECTED_FORM
    assert "no record to write; left out: 1 documents" in fails(capsys, "in.json", "x.jsonl")
    words = ("in.json", "x.jsonl", "--question-label", "Key", "--answer-label", "Key")
    assert "--question-label and --answer-label are both Key" in fails(capsys, *words)


def test_ubiai_documents_that_are_bad(folder: Path, capsys: pytest.CaptureFixture[str]):
    lost = document(relations=[{"head": 0, "child": 99}])
    records = [lost, document(tokens=7), {"documentName": "x.jpg"}, document(), document(documentName="no.jpg")]
    told = fails(capsys, put("in.json", records), "out.jsonl")
    assert "record 0 ('form.jpg'): relations refer to ['0', '99'], but no entity has this token_start, start" in told
    assert len(run("in.json", "out.jsonl", "--on-bad", "skip")) == 1
    reasons = [json.loads(line)["reason"] for line in Path("out.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [reason.split("`")[0] for reason in reasons[1:]] == [
        "Expected ", "image file images/no.jpg does not exist"
    ]  # fmt: skip


def result(kind: str, name: str, **value: Any) -> dict[str, Any]:
    """A result of Label Studio's."""
    return {"id": "x", "type": kind, "from_name": name, "to_name": "image", "value": value}


def task(image: str, *results: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A task of Label Studio's, with an annotation that was cancelled before the one that counts."""
    cancelled = {"was_cancelled": True, "result": [result("textarea", "text", text=["wrong"])]}
    done = {"was_cancelled": False, "result": list(results), "completed_by": 1}
    return {
        "id": 12,
        "data": {"image": image, "q": "What is it?"},
        "annotations": [cancelled, done, cancelled],
        **others,
    }


BOX = result("rectanglelabels", "box", x=1, y=2, width=3, height=4, rectanglelabels=["cat"])


def test_label_studio(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = result("textarea", "text", text=["a cat", "asleep"])
    tasks = [task("/data/local-files/?d=deep%2Fc.png", BOX, text), task("/data/upload/7/upload-d.png", text),
             task("/data/upload/3/e%20f.png", text), task("a.png"),
             {**task("a.png", text), "annotations": []}]  # fmt: skip
    found = run(put("in.json", tasks), "out.jsonl", "--prompt", "Describe it.")
    assert [talk(record) for record in found] == [
        [(f"[{name}]", "\nDescribe it."), ("a cat\nasleep",)] for name in ("deep/c.png", "7/upload-d.png", "e f.png")
    ]
    told = capsys.readouterr().out
    assert "left out: 1 tasks without an answer; left out: 1 tasks without a completed annotation" in told


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (result("choices", "kind", choices=["cat", "pet"]), "cat, pet"),
        (result("rating", "kind", rating=4), "4"),
        (result("number", "kind", number=0), "0"),
        (result("textarea", "kind", text="as a string"), "as a string"),
    ],
)
def test_answers_of_label_studio(value: dict[str, Any], answer: str, folder: Path):
    words = (put("in.json", [task("a.png", BOX, value)]), "out.jsonl", "--question-field", "q")
    [found] = run(*words, "--instruction", "Briefly.")
    assert talk(found) == [("[a.png]", "\nWhat is it?\nBriefly."), (answer,)]


def test_several_controls_of_label_studio(folder: Path, capsys: pytest.CaptureFixture[str]):
    text, kind = result("textarea", "text", text=["a cat"]), result("choices", "kind", choices=["pet"])
    for tasks in ([task("a.png", text, kind)], [task("a.png", text), task("a.png", kind)]):
        put("in.json", tasks)
        told = fails(capsys, "in.json", "out.jsonl", "--prompt", "What?")
        assert "--from-name: which control has the answer? There are kind, text" in told
    [_, found] = run(put("in.json", [task("a.png", kind), task("a.png", text, kind)]), "out.jsonl", "--prompt", "What?",
                     "--from-name", "kind")  # fmt: skip
    assert talk(found)[1] == ("pet",)


def test_label_studio_json_min(folder: Path, capsys: pytest.CaptureFixture[str]):
    known = {"annotator": 1, "annotation_id": 5, "created_at": "2024", "updated_at": "2024", "lead_time": 3.5}
    tasks = [{"id": 1, "image": "a.png", "q": "What?", "caption": ["a cat", "asleep"], **known},
             {"id": 2, "image": "b.png", "q": "What?", "caption": {"choices": ["dog", "pet"]}, **known},
             {"id": 3, "image": "b.png", "q": "What?", **known}]  # fmt: skip
    options = ("--from", "label-studio", "--question-field", "q")
    found = run(put("in.json", tasks), "out.jsonl", *options)
    assert [talk(record)[1] for record in found] == [("a cat\nasleep",), ("dog, pet",)]
    put("in.json", [{**tasks[0], "other": "x"}])
    assert "There are caption, other" in fails(capsys, "in.json", "x.jsonl", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "label-studio needs a question: give --prompt, or --question-field"),
        (("--prompt", "a", "--question-field", "q"), "give --prompt, or --question-field"),
        (("--question-field", "x"), "record 0 ('12'): `x` must be a string of its data, which has image, q"),
        (("--prompt", "a", "--image-field", "x"), "`x` must be a string of its data"),
    ],
)
def test_label_studio_without_what_it_needs(
    options: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    source = put("in.json", [task("a.png", result("textarea", "text", text=["a cat"]))])
    assert message in fails(capsys, source, "out.jsonl", *options)


# The command


def test_every_form_is_converted_and_every_option_has_a_flag():
    assert set(FORMATS) - {"pair", "preference"} <= set(CONVERSIONS), "these are several conversations in one"
    assert {one.form for one in CONVERSIONS.values()} <= set(FORMATS)
    own = {name for one in CONVERSIONS.values() for name in keyword_parameters(one.records)}
    known = {name for one in CONVERSIONS.values() for name in one.options}
    assert own - {"group", "by_label"} <= set(OPTIONS) <= known
    assert set(FORMS) == {"llava", "messages"}


def test_help_names_everything(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in CONVERSIONS)
    assert "FOLDER/%06d.tar" in told


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LLAVA, "llava"),
        ([{"messages": []}], "messages"),
        ([{"id": "1", "image": "a.png", "caption": "a cat"}], "caption"),
        ([{"question": "what?", "answer": "a cat"}], "question"),
        ([{"source": "x", "conversations": ["what?", "a cat"]}], "head"),
        ({"images": [], "annotations": []}, "coco-captions"),
        ({"questions": []}, "vqa"),
        ([{"documentName": "a.png"}], "ubiai"),
        ([{"data": {}, "annotations": []}], "label-studio"),
    ],
)
def test_what_an_input_is(content: Any, found: str, folder: Path):
    assert convert.detect_conversion(put("in.json", content), Path("cache")) == found
    if isinstance(content, list):
        assert convert.detect_conversion(put("in.jsonl", content), Path("cache")) == found
    put("bom.json", "\ufeff " + json.dumps(content))
    if not isinstance(content, list):
        assert convert.detect_conversion("bom.json", Path("cache")) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"picture": "a.png", "text": "a cat"}],
            "its records are of no known kind (keys: picture, text); it looks like images with captions: "
            "add --from caption --option image_key=picture",
        ),
        (
            [{"image": "a.png", "caption": "a", "question": "b", "answer": "c"}],
            "its records may be caption or question",
        ),
        (
            {"records": []},
            "a list of records is needed, or one record on each line, got an object with the keys records",
        ),
        ([7], "of no known kind"),
    ],
)
def test_inputs_that_cannot_be_told(content: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert message in fails(capsys, put("in.json", content), "out.jsonl")


@pytest.mark.parametrize(("picture", "text"), [("picture", "text"), ("which", "said")])
def test_options_that_name_the_keys_tell_the_kind(folder: Path, picture: str, text: str):
    put("in.json", [{picture: "a.png", text: "a cat"}])
    keys = ("--option", f"image_key={picture}", "--option", f"caption_key={text}")
    assert run("in.json", "out.json", *keys) == run("in.json", "same.json", "--format", "caption", *keys)


LINES = "\n".join(map(json.dumps, LLAVA[:2])) + "\n"
WRAPPED = json.dumps({"version": 1, "data": LLAVA[:2]})


@pytest.mark.parametrize(
    ("name", "content"), [("in.json", LINES), ("in.json", WRAPPED), ("in.jsonl", json.dumps(LLAVA[:2]))]
)
def test_an_input_is_what_it_holds_whatever_its_name_says(folder: Path, name: str, content: str):
    assert run(put(name, content), "out.json") == run(put("whole.json", LLAVA[:2]), "whole_out.json")


def test_an_input_of_another_kind_names_that_and_no_other_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    coco = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    told = fails(capsys, put("in.json", coco), "out.json", "--from", "question")
    assert told.endswith(
        "in.json: it holds COCO's captions; convert them first: vlm data convert in.json OUT.jsonl --from coco-captions"
    )
    chats = [{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    told = fails(capsys, put("in.json", chats), "out.json")
    assert "it looks like chat messages: add --from messages --option key=conversations" in told
    assert len(run("in.json", "out.json", "--from", "messages", "--option", "key=conversations")) == 1


def test_bad_records_stop_or_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps(LLAVA[0]), "{broken", json.dumps(asked("<image>", "no", id="9", image="no.png")), "5"]
    source = put("in.jsonl", "\n".join([*lines, json.dumps(LLAVA[1])]))
    told = fails(capsys, source, "out.jsonl")
    assert told.startswith("vlm data convert: record 1: not JSON")
    assert told.endswith("; --on-bad skip lists such records and continues")
    assert run(source, "out.jsonl", "--on-bad", "skip") == LLAVA[:2]
    assert "2 records written" in (told := capsys.readouterr().out)
    assert told.endswith("; 3 skipped, see out.jsonl.skipped.jsonl\n")
    skipped = [json.loads(line) for line in Path("out.jsonl.skipped.jsonl").read_text().splitlines()]
    assert [(one["record"], one["id"]) for one in skipped] == [(1, "?"), (2, "9"), (3, "?")]
    run(put("in.jsonl", LLAVA), "out.jsonl", "--force")
    assert not Path("out.jsonl.skipped.jsonl").exists()


def test_nothing_but_bad_records(folder: Path, capsys: pytest.CaptureFixture[str]):
    source = put("in.jsonl", [{"id": "1", "conversations": []}])
    assert "no record to write; record 0 ('1'): `conversations` must" in fails(
        capsys, source, "x.jsonl", "--on-bad", "skip"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("in.jsonl", "in.jsonl", "--force"), "in.jsonl: that is the input; choose another output"),
        (("in.jsonl", "there.json"), "there.json exists; choose another output, or replace it with --force"),
        (("in.jsonl", "out.txt"), "out.txt: allowed are NAME"),
        (("no.jsonl", "out.jsonl"), "no.jsonl"),
        (
            ("in.jsonl", "out.jsonl", "--prompt", "x"),
            "--from llava has no option prompt; it has key, ignore_keys, image_key, split, subset",
        ),
        (("in.jsonl", "out.jsonl", "--from", "vqa"), "--from vqa needs --annotations, --image-pattern"),
        (("in.jsonl", "out.jsonl", "--option", "kye=chat"), "has no option kye"),
        (("in.jsonl", "out.jsonl", "--embed-images"), "--embed-images: it is for .parquet"),
        (("in.jsonl", "out.jsonl", "--from", "coco-captions"), "in.jsonl: not what is converted here"),
        (("in.jsonl", "out.jsonl", "--from", "messages"), "record 0 ('1'): it has no `messages`"),
    ],
)
def test_what_cannot_be_done(words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    put("in.jsonl", LLAVA)
    put("there.json", LLAVA)
    assert message in fails(capsys, *words)
    assert json.loads(Path("there.json").read_text()) == LLAVA


def test_an_image_folder_that_is_not_there(folder: Path):
    with pytest.raises(SystemExit, match="--image-folder nowhere: there is no such folder"):
        main([put("in.jsonl", LLAVA), "out.jsonl", "--image-folder", "nowhere"])


def test_images_lie_beside_the_records_by_default(folder: Path):
    put("images/in.jsonl", LLAVA)
    main(["images/in.jsonl", "out.jsonl"])
    assert Path("out.jsonl").read_text(encoding="utf-8").count("a.png") == 2


@pytest.mark.parametrize("text", ["key", "=3", "a b=3"])
def test_options_that_are_none(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["in.jsonl", "out.jsonl", "--option", text])
    assert "write it as NAME=VALUE" in capsys.readouterr().err


def test_stopped_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stopped(*_: object, **__: object) -> Iterator[Any]:
        yield LLAVA[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "stream_records", stopped)
    words = (put("in.jsonl", LLAVA), "out.json", "--from", "llava")
    assert "stopped; nothing was written" in fails(capsys, *words)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*words) == LLAVA


@pytest.mark.parametrize("output", ["out.jsonl", "out.json", "out.parquet", "shards/"])
@pytest.mark.parametrize("kind", ["llava", "ubiai", "label-studio"])
def test_records_are_not_collected(output: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each record is written before the next but one is read."""
    given = {"llava": LLAVA[0], "ubiai": document(), "label-studio": task("a.png", result("rating", "r", rating=3))}
    counts = Counter[str]()
    writer = convert.make_writer

    def endless(*_: object, **__: object) -> Iterator[Any]:
        for counts["read"] in range(1, 301):
            assert counts["read"] - counts["written"] <= 2
            yield given[kind]

    def counting(*words: Any, **options: Any) -> Any:
        made = writer(*words, **options)
        add = made.add

        def counted(record: Any) -> None:
            counts["written"] += 1
            add(record)

        made.add = counted
        return made

    for module in (convert, exports):
        monkeypatch.setattr(module, "stream_records", endless)
    monkeypatch.setattr(convert, "make_writer", counting)
    options = ["--prompt", "Rate it."] if kind == "label-studio" else []
    main(["in.jsonl", output, "--from", kind, "--image-folder", "images", *options])
    assert counts == {"read": 300, "written": 300}


def test_lines_of_captions_are_taken_as_they_are_needed(folder: Path):
    put("in.tsv", "a cat\thttps://example.com/0\n" * 3)
    records = CONVERSIONS["conceptual-captions"].records(
        "in.tsv", convert.ConversionContext(Path("images"), Path("cache"), Counter())
    )
    assert isinstance(records, Iterator)
    assert [record["id"] for record in itertools.islice(records, 1)] == ["000000000"]


def test_samples_are_images_and_turns(folder: Path):
    [found] = run(put("in.jsonl", LLAVA[:1]), "out.jsonl")
    seen = ImageRef(Path("images/a.png"))
    asked_and_told = (Turn("user", (seen, "\nwhat is it?")), Turn("assistant", ("a cat",)))
    assert FORMATS["llava"](found, Path("images")) == Sample("1", asked_and_told)
