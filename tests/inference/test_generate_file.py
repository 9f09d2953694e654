"""Answers to a file of records: each as alone, none lost, gone on with where it was stopped; and the command for it."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import refusal
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.config.dataset_schema import SourceConfig
from vlm.config.schema import InferenceConfig
from vlm.data.sample import ImageRef, Turn
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.generate_file import generate_file, question_text
from vlm.inference.prompts import user_turn

GREEDY = InferenceConfig(max_new_tokens=6)
SAMPLED = InferenceConfig(temperature=3.0, max_new_tokens=6)
QUESTIONS = ["what?", "a rather longer question about <image> and <image>: which is it?", "no picture here", "<image>"]
"""Of two images, of one, of none."""
NUMBER = 7
"""So many records."""


@pytest.fixture(scope="module")
def ours(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


@pytest.fixture(scope="module")
def checkpoint(ours: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final"
    ours.model.save_pretrained(folder)
    ours.processor.save_pretrained(folder)
    return folder


def image_refs_from_value(number: int) -> int:
    return (1, 2, 0, 1)[number % 4]


def make_question(number: int) -> str:
    text = QUESTIONS[number % 4]
    return f"<image>\n{text}" if image_refs_from_value(number) > text.count("<image>") else text


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records of different lengths and numbers of images; the last one has a turn before its question."""
    found = []
    for number in range(NUMBER):
        names = [f"{number}-{place}.png" for place in range(image_refs_from_value(number))]
        for place, name in enumerate(names):
            picture(10 * number + place).save(tmp_path / name)
        turns = [{"from": "human", "value": make_question(number)}, {"from": "gpt", "value": f"gold {number}"}]
        found.append({"id": f"r{number}", "image": names, "conversations": turns})
    before = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "well?"}]
    found[-1]["conversations"] = [*before, *found[-1]["conversations"]]
    (tmp_path / "records.json").write_text(json.dumps(found))
    return tmp_path / "records.json"


def answer_alone(ours: VisionLanguageModel, folder: Path, number: int) -> str:
    """What the model answers to one of the records, asked by itself."""
    before = [Turn("user", ("hello",)), Turn("assistant", ("well?",))] if number == NUMBER - 1 else []
    images = [picture(10 * number + place) for place in range(image_refs_from_value(number))]
    return ours.answer([[*before, user_turn(make_question(number), len(images))]], [images], GREEDY)[0]


def generate_rows(
    ours: VisionLanguageModel, records: Path, name: str = "answers.jsonl", settings: InferenceConfig = GREEDY,
    **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    named = {"fingerprint": "f", "batch_size": 2, "num_workers": 0, "max_frames": 2, "format": "llava", **options}
    source = SourceConfig(path=str(records), format=named.pop("format"), options=named.pop("options", {}))
    return generate_file(ours, source, records.with_name(name), settings, cache=records.parent / "cache", **named)


def change_record(records: Path, number: int, **keys: Any) -> None:
    """Put keys into a record of the file."""
    content = json.loads(records.read_text())
    content[number] |= keys
    records.write_text(json.dumps(content))


# Answers


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_answers_as_each_alone(ours: VisionLanguageModel, records: Path, batch_size: int):
    rows = generate_rows(ours, records, batch_size=batch_size)
    assert [row["answer"] for row in rows] == [answer_alone(ours, records.parent, number) for number in range(NUMBER)]
    assert len({row["answer"] for row in rows}) > 3  # or this would prove little
    assert [row["source"] for row in rows] == [f"r{number}" for number in range(NUMBER)]
    assert not any(row["error"] for row in rows)


def test_a_row_says_what_was_asked_and_what_the_record_replies(ours: VisionLanguageModel, records: Path):
    rows = generate_rows(ours, records)
    first, second, third = rows[:3]
    assert (first["prompt"], first["reference"]) == ("what?", "gold 0")
    assert second["prompt"] == "a rather longer question about <image> and <image>: which is it?"
    assert second["image_path"].split(";") == [str(records.parent / f"1-{place}.png") for place in (0, 1)]
    assert third["image_path"] == ""
    assert rows[3]["prompt"] == ""
    assert (rows[-1]["prompt"], rows[-1]["reference"]) == ("no picture here", f"gold {NUMBER - 1}")
    assert json.loads((records.parent / "answers.jsonl").read_text().splitlines()[0]) == first


def test_the_reply_never_reaches_the_model(ours: VisionLanguageModel, records: Path):
    """Another reply, or none, gives the same answer."""
    before = generate_rows(ours, records)
    content = json.loads(records.read_text())
    content[0]["conversations"][1]["value"] = "something else entirely"
    content[1]["conversations"].pop()
    records.write_text(json.dumps(content))
    after = generate_rows(ours, records, "other.jsonl")
    assert [row["answer"] for row in after] == [row["answer"] for row in before]
    assert [row["reference"] for row in after[:2]] == ["something else entirely", None]


def test_records_that_cannot_be_asked_are_rows(ours: VisionLanguageModel, records: Path):
    before = generate_rows(ours, records)
    records.with_name("0-0.png").write_text("no image")
    change_record(records, 3, image=["missing.png"])
    change_record(records, 4, conversations=[{"from": "human", "value": "<image>\n" + "word " * 600}])
    change_record(records, 5, conversations=[])
    change_record(records, 6, image=["5-0.png"])
    rows = generate_rows(ours, records, "other.jsonl")
    assert [number for number, row in enumerate(rows) if row["error"]] == [0, 3, 4, 5, 6]
    assert all(row["answer"] is None for row in rows if row["error"])
    assert "0-0.png does not open" in rows[0]["error"]
    assert (rows[0]["prompt"], rows[0]["reference"]) == ("what?", "gold 0")
    assert "missing.png does not exist" in rows[3]["error"]
    assert [Path(row["image_path"]).name for row in (rows[0], rows[3])] == ["0-0.png", "missing.png"]
    assert "tokens and its answer may have 6 (max_new_tokens), but the model reads at most 512" in rows[4]["error"]
    assert "`conversations` must be a list" in rows[5]["error"]
    assert "its text has no <image>, but the record has 1 image" in rows[6]["error"]
    kept = [number for number in range(NUMBER) if number not in (0, 3, 4, 5, 6)]
    assert [rows[number] for number in kept] == [before[number] for number in kept]


def test_broken_lines_are_rows(ours: VisionLanguageModel, records: Path):
    lines = [json.dumps(one) for one in json.loads(records.read_text())[:3]]
    broken = records.with_suffix(".jsonl")
    broken.write_text("\n".join([lines[0], "{broken", lines[1]]))
    rows = generate_rows(ours, broken)
    assert [row["source"] for row in rows] == ["r0", "records.jsonl:1", "r1"]
    assert "not JSON" in rows[1]["error"]


def test_a_table(ours: VisionLanguageModel, records: Path):
    change_record(records, 0, image=["missing.png"])
    rows = generate_rows(ours, records, "answers.csv")
    with (records.parent / "answers.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert {"source", "image_path", "prompt", "answer", "reference", "error"} <= set(read[0])
    assert [row["answer"] for row in read] == [row["answer"] or "" for row in rows]


def test_questions_as_llava_writes_them(ours: VisionLanguageModel, records: Path):
    """`{"question_id", "image", "text"}`: labelled records without a label, whose prompt has another name."""
    asked = records.with_name("questions.jsonl")
    questions = [{"question_id": 7, "image": "0-0.png", "text": "what?", "category": "conv"},
                 {"question_id": 8, "text": "no picture here"}]  # fmt: skip
    asked.write_text("\n".join(map(json.dumps, questions)))
    rows = generate_rows(ours, asked, format="labelled", options={"prompt_key": "text"})
    assert [(row["source"], row["prompt"], row["reference"]) for row in rows] == [
        ("7", "what?", None), ("8", "no picture here", None)
    ]  # fmt: skip
    assert rows[0]["answer"] == answer_alone(ours, records.parent, 0)


def test_a_question_without_the_images_before_it():
    shown = ImageRef(Path("a.png"))
    assert question_text(Turn("user", (shown, shown, "\nwhat?"))) == "what?"
    assert question_text(Turn("user", ("this ", shown, " or that ", shown, "?"))) == "this <image> or that <image>?"


# Going on


class Stopped(Exception):
    """As if the process had ended."""


def stop_after(ours: VisionLanguageModel, batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model answer so many batches, then stop; the sizes of those it was asked."""
    real, sizes = ours.answers, []

    def answers(inputs: Any, settings: Any) -> list[str]:
        if len(sizes) == batches:
            raise Stopped
        sizes.append(len(inputs["input_ids"]))
        return real(inputs, settings)

    monkeypatch.setattr(ours, "answers", answers)
    return sizes


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("torn", [False, True])
def test_it_goes_on_where_it_was_stopped(
    ours: VisionLanguageModel, records: Path, settings: InferenceConfig, torn: bool, monkeypatch: pytest.MonkeyPatch
):
    """To the same answers, sampled ones too; what was left of a batch is asked again."""
    whole = generate_rows(ours, records, "whole.jsonl", settings, seed=1)
    with monkeypatch.context() as patch:
        stop_after(ours, 2, patch)
        with pytest.raises(Stopped):
            generate_rows(ours, records, settings=settings, seed=1)
    begun = records.with_name("answers.jsonl.partial")
    assert len(begun.read_text().splitlines()) == 4
    if torn:
        begun.write_text("\n".join(begun.read_text().splitlines()[:3]) + '\n{"source": "r')
    with monkeypatch.context() as patch:
        sizes = stop_after(ours, 9, patch)
        rows = generate_rows(ours, records, settings=settings, seed=1)
    assert sizes == ([2, 2, 1] if torn else [2, 1])
    assert rows == whole
    assert records.with_name("answers.jsonl").read_bytes() == records.with_name("whole.jsonl").read_bytes()
    assert not begun.exists()


def test_sampling_follows_its_seed(ours: VisionLanguageModel, records: Path):
    drawn = [[row["answer"] for row in generate_rows(ours, records, f"{name}.jsonl", SAMPLED, seed=seed)]
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (GREEDY, {"fingerprint": "of another checkpoint"}),
        (GREEDY, {"settings": InferenceConfig(max_new_tokens=7)}),
        (GREEDY, {"records": {"id": "new"}}),
        (SAMPLED, {"seed": 2}),
        (SAMPLED, {"batch_size": 3}),
    ],
    ids=str,
)
def test_something_else_does_not_go_on_with_it(
    ours: VisionLanguageModel, records: Path, settings: InferenceConfig, change: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    options = {"settings": settings, "seed": 1}
    with monkeypatch.context() as patch:
        stop_after(ours, 1, patch)
        with pytest.raises(Stopped):
            generate_rows(ours, records, **options)
    if "records" in change:
        change_record(records, 0, **change["records"])
        change = {}
    with pytest.raises(ValueError, match="started with another checkpoint, other records or other options"):
        generate_rows(ours, records, **{**options, **change})
    assert len(generate_rows(ours, records, **{**options, **change}, overwrite=True)) == NUMBER


def test_greedy_answers_go_on_in_batches_of_another_size(
    ours: VisionLanguageModel, records: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after a batch that was too large for the memory."""
    whole = generate_rows(ours, records, "whole.jsonl")
    with monkeypatch.context() as patch:
        stop_after(ours, 2, patch)
        with pytest.raises(Stopped):
            generate_rows(ours, records)
    assert generate_rows(ours, records, batch_size=3) == whole


def test_what_is_there_is_kept(ours: VisionLanguageModel, records: Path):
    generate_rows(ours, records)
    with pytest.raises(ValueError, match=r"answers.jsonl exists; choose another --output, or add --overwrite"):
        generate_rows(ours, records)
    assert len(generate_rows(ours, records, overwrite=True)) == NUMBER


def test_more_than_the_model_can_read_is_refused_at_once(ours: VisionLanguageModel, records: Path):
    with pytest.raises(
        ValueError, match=r"its answer may have 512 \(max_new_tokens\), but the model reads at most 512"
    ):
        generate_rows(ours, records, settings=InferenceConfig(max_new_tokens=512))


# The command


def ask(*words: object) -> None:
    main(["generate", *map(str, words), "--num-workers", "0", "--device", "cpu"])


def test_the_command_writes_what_the_function_does(
    ours: VisionLanguageModel, checkpoint: Path, records: Path, capsys: pytest.CaptureFixture[str]
):
    change_record(records, 2, image=["missing.png"])
    output = records.with_name("said.jsonl")
    ask(checkpoint, "--input", records, "--output", output, "--max-new-tokens", 6, "--batch-size", 4)
    assert capsys.readouterr().out == f"{NUMBER} records: {output}; 1 were not asked, the column error says why\n"
    assert [json.loads(line) for line in output.read_text().splitlines()] == generate_rows(ours, records)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "RECORDS"], "--input and --output go together"),
        (["--input", "RECORDS", "--output", "a.jsonl", "--prompt", "x"], "give --prompt for one question, or --input"),
        (["--input", "RECORDS", "--output", "a.jsonl", "--image", "x.png"], "--image and --video go with --prompt"),
        (["--input", "no.json", "--output", "a.jsonl"], "--input no.json: no such file in "),
        (["--input", "RECORDS", "--output", "a.txt"], "--output a.txt: it must end in .csv or .jsonl"),
        (["--input", "RECORDS", "--output", "RECORDS/a.csv"], "records.json is not a folder that can be written to"),
        (["--input", "RECORDS", "--output", "FOLDER.csv"], "this is a folder"),
        (["--input", "RECORDS", "--output", "a.jsonl", "--temperature", "-1"], "temperature=-1.0: 0 (greedy) or more"),
        (["--input", "RECORDS", "--output", "a.jsonl", "--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
        (["--input", "RECORDS", "--output", "a.jsonl", "--format", "nope"], "--format nope: allowed are llava"),
        ([], "give --prompt for one question, or --input and --output for a file of records"),
        (["--prompt", "x", "--device", "nowhere"], "device=nowhere: "),
        (["--prompt", "x", "--base", "/nowhere"], "is a complete model; it needs no base"),
        (["--prompt", "word " * 600], "tokens and its answer may have 128 (max_new_tokens), but the model reads at"),
    ],
)
def test_the_command_refuses_clearly(checkpoint: Path, records: Path, words: list[str], said: str):
    records.with_name("folder.csv").mkdir()
    places = {"RECORDS": str(records), "FOLDER.csv": str(records.with_name("folder.csv"))}
    filled = [word.replace("RECORDS", str(records)) if "RECORDS" in word else places.get(word, word) for word in words]
    found = refusal("generate", str(checkpoint), *filled)
    assert found.startswith("vlm generate: ")
    assert said in found


RUN = """
defaults: [base, _self_]
dataset: {path: "???"}
inference: {max_new_tokens: 3, temperature: 0.7}
"""


def test_a_run_says_how_answers_are_drawn(
    ours: VisionLanguageModel, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Its section is the default, the command line changes its keys, and an option of the command wins."""
    (tmp_path / "mine.yaml").write_text(RUN)
    seen: list[InferenceConfig] = []
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(
        VisionLanguageModel, "stream_batch", lambda self, inputs, settings: iter([seen.append(settings)][1:])
    )
    monkeypatch.setattr(VisionLanguageModel, "load", lambda *given, **named: ours)
    run = ["--prompt", "what?", "--config-dir", tmp_path, "-cn", "mine"]
    ask(checkpoint, *run)
    ask(checkpoint, *run, "inference.temperature=0.9", "inference.num_beams=1")
    ask(checkpoint, "--temperature", 0, *run, "inference.temperature=0.9", "--top-p", 0.5)
    ask(checkpoint, "--prompt", "what?", "-cn", "finetune-smol")
    assert seen == [
        InferenceConfig(0.7, max_new_tokens=3), InferenceConfig(0.9, max_new_tokens=3),
        InferenceConfig(0.0, 0.5, max_new_tokens=3), InferenceConfig(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inference.temprature=1"], "vlm: inference.temprature: no such key. Did you mean inference.temperature?"),
        (["inference.top_p=2"], "vlm: inference.top_p=2.0: a share above 0, at most 1 is needed"),
        (
            ["inference.cache_implementation=fixed"],
            "vlm: inference.cache_implementation=fixed: allowed are null, dynamic, static, offloaded",
        ),
        (["inference.num_beams=few"], "vlm: inference.num_beams=few: a whole number is needed"),
        (["dataset.path=x"], "vlm generate: dataset.path=x: one word too many; only inference.KEY=VALUE may follow"),
    ],
)
def test_other_keys_of_a_run_are_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert said in refusal("generate", "no/such/checkpoint", "--prompt", "x", "-cn", "finetune-smol", *words)


def test_keys_of_a_run_need_a_run():
    said = refusal("generate", "x", "--prompt", "x", "inference.temperature=1")
    assert said == "vlm generate: inference.temperature=1: add -cn RUN, the run that it changes"


KILLED = """
import os, signal, sys
from vlm.cli.main import main
from vlm.inference.generate import VisionLanguageModel
answers, asked = VisionLanguageModel.answers, []
def dying(self, inputs, settings):
    asked.append(1)
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(self, inputs, settings)
VisionLanguageModel.answers = dying
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(ours: VisionLanguageModel, checkpoint: Path, records: Path):
    output = records.with_name("killed.csv")
    words = [str(checkpoint), "--input", str(records), "--output", str(output), "--temperature", "3", "--seed", "1",
             "--max-new-tokens", "6", "--batch-size", "2"]  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", KILLED, "generate", *words], env=dict(os.environ), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(output.with_name("killed.csv.partial").read_text().splitlines()) == 4
    ask(*words)
    ask(*words[:4], records.with_name("whole.csv"), *words[5:])
    assert output.read_bytes() == records.with_name("whole.csv").read_bytes()
