"""`vlm eval`: measures of a file of records, lmms-eval's tasks through another Python, and what is refused first."""

import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.command_line import refusal
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from vlm import VisionLanguageModel, VLMForPrediction, VLMPredictionConfig
from vlm.checks.weights import fingerprint
from vlm.cli.main import main
from vlm.config.dataset_schema import SourceConfig
from vlm.data.blank_images import make_blank_image
from vlm.data.dataset import BlankImageDataset
from vlm.data.record_identity import identify_records
from vlm.evaluation.lmms_run import format_model_args, make_environment
from vlm.evaluation.records import load_supervised_dataset
from vlm.runs.evaluated_records import RECORD_SUMS_FILE, read_evaluated_records
from vlm.runs.files import Folder

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory's `final`, untrained."""
    folder = tmp_path_factory.mktemp("run") / "final"
    ready = make_random_model(parts, "llama")
    ready.model.save_pretrained(folder)
    ready.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records: of four the reply is what the model answers; one image is missing, one has no reply."""
    folder = tmp_path_factory.mktemp("records")
    model = VisionLanguageModel.load(checkpoint, device="cpu")
    found = []
    for number in range(8):
        image = f"{number}.png"
        Image.new("RGB", (30 + number, 24), COLOURS[number % 3]).save(folder / image)
        question = f"what{' really' * number}?"
        reply = model.generate(question, [folder / image], max_new_tokens=8) if number < 4 else "something else"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        found.append({"id": f"r{number}", "image": image, "conversations": turns[: 1 if number == 7 else 2]})
    (folder / "6.png").unlink()
    (folder / "val.json").write_text(json.dumps(found))
    return folder / "val.json"


def evaluate(*words: object) -> None:
    main(["eval", *map(str, words), "--num-workers", "0", "--device", "cpu", "--max-new-tokens", "8"])


def test_answers_and_losses_are_measured(checkpoint: Path, records: Path, capsys: pytest.CaptureFixture[str]):
    evaluate(checkpoint, "--data", records, "--metrics", "exact_match,rouge,bleu,loss", "--batch-size", "3")
    place = checkpoint.parent / "eval" / "val"
    written = ["answers.jsonl", "record_sums.json", "results.json", "results.md"]
    assert sorted(file.name for file in place.iterdir()) == written
    results = json.loads((place / "results.json").read_text())
    assert (results["records"], results["answered"]) == (8, 6)
    assert results["weights"] == {"folder": checkpoint.name, "fingerprint": fingerprint(checkpoint)}
    assert results["metrics"]["exact_match"]["value"] == pytest.approx(4 / 6)
    assert results["metrics"]["exact_match"]["low"] < 4 / 6 < results["metrics"]["exact_match"]["high"]
    assert results["metrics"]["bleu"]["low"] is None
    left_out = "\n".join(results["left_out"])
    assert "2 of 8 records are not in the losses" in left_out
    assert "1 of 8 records could not be used; the first is 'r6': image" in left_out
    assert "1 of 8 records have neither a reply nor `answers`" in left_out
    said = capsys.readouterr().out
    for name in ("exact_match", "rouge", "bleu", "loss", "blank_loss", "image_gain"):
        assert f"\n{name} " in said
        assert f"| {name} " in (place / "results.md").read_text()
    assert "results.json exists; choose another --output" in refusal(
        "eval", str(checkpoint), "--data", str(records), "--metrics", "exact_match"
    )


def test_the_losses_are_those_of_the_model(checkpoint: Path, records: Path, tmp_path: Path):
    """As the model itself gives them, record by record, with images and with blank ones."""
    evaluate(checkpoint, "--data", records, "--metrics", "loss", "--output", tmp_path)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    ready = VisionLanguageModel.load(checkpoint, device="cpu")
    dataset = load_supervised_dataset(ready, SourceConfig(path=str(records)), 8)
    kept = read_evaluated_records(Folder(tmp_path), RECORD_SUMS_FILE)
    assert kept is not None
    for data, name in ((dataset, "loss"), (BlankImageDataset(dataset), "blank_loss")):
        total, tokens = 0.0, 0
        for index in range(len(data)):
            item: Any = data[index]
            ids, labels = (torch.tensor([item[key]]) for key in ("input_ids", "labels"))
            pixels = ready.processor.normalise(item["pixel_values"])
            with torch.no_grad():
                loss = ready.model(input_ids=ids, labels=labels, pixel_values=pixels).loss
            number = int((labels[:, 1:] != -100).sum())
            total, tokens = total + loss.item() * number, tokens + number
        assert metrics[name]["value"] == pytest.approx(total / tokens, rel=1e-4)
        assert kept.metrics[name].value == pytest.approx(total / tokens, rel=1e-4)
        assert kept.metrics[name].counts.sum() == tokens
    assert kept.records == identify_records(dataset)
    evaluate(checkpoint, "--data", records, "--metrics", "exact_match", "--output", tmp_path, "--overwrite")
    assert not (tmp_path / RECORD_SUMS_FILE).exists()


def test_retrieval_stands_beside_chance(
    checkpoint: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Records without an image are told and left out; too few texts are refused with what to change."""
    captioned = json.loads(records.read_text())[:6]
    for number, record in enumerate(captioned):
        record["conversations"][1]["value"] = f"thing {number}"
    captioned[5]["conversations"][0]["value"] = "what?"
    del captioned[5]["image"]
    path = records.with_name("captioned.json")
    path.write_text(json.dumps(captioned))
    words = ["--data", path, "--metrics", "retrieval", "--output", tmp_path / "out"]
    evaluate(checkpoint, *words, "--retrieval-candidates", "4")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["metrics"]) == ["retrieval", "retrieval_chance"]
    assert results["metrics"]["retrieval_chance"]["value"] == 0.25
    rows = [json.loads(line) for line in (tmp_path / "out/retrieval.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == [f"r{number}" for number in range(5)]
    assert sum(row["found"] for row in rows) / 5 == results["metrics"]["retrieval"]["value"]
    assert all(len(row["texts"]) == 4 for row in rows)
    found = results["metrics"]["retrieval"]
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert (results["records"], results["answered"], "inference" in results) == (6, 0, False)
    assert "1 of 6 records are not in retrieval: they show no image" in "".join(results["left_out"])
    assert "retrieval_chance  0.250" in capsys.readouterr().out
    said = refusal("eval", str(checkpoint), *map(str, words), "--overwrite", "--num-workers", "0", "--device", "cpu")
    assert "10 different texts are needed, and for record 'r0' there are 5" in said
    assert "lower --retrieval-candidates (now 10)" in said


def test_hallucinations_stand_beside_those_on_blank_images(checkpoint: Path, records: Path, tmp_path: Path):
    """The blank answers are those of the model to blank images of the same sizes."""
    asked = json.loads(records.read_text())[:6]
    for number, record in enumerate(asked):
        record["conversations"][1]["value"] = "yes" if number % 2 else "no"
        record["answers"] = ["yes" if number % 2 else "no"]
    path = records.with_name("pope.json")
    path.write_text(json.dumps(asked))
    evaluate(checkpoint, "--data", path, "--metrics", "exact_match,pope,chair", "--output", tmp_path)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    names = [name for name in metrics if name != "exact_match"]
    assert [name for name in names if not name.startswith("blank_")] == [
        "pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes", "pope_unclear",
        "chair_i", "chair_s", "chair_recall", "chair_objects",
    ]  # fmt: skip
    assert {f"blank_{name}" for name in names if not name.startswith("blank_")} < set(names)
    ready = VisionLanguageModel.load(checkpoint, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "answers-blank.jsonl").read_text().splitlines()]
    blank = make_blank_image(ready.processor, (24, 30))
    assert rows[0]["answer"] == ready.generate("what?", [blank], max_new_tokens=8)
    assert rows[0]["image_path"].endswith("0.png"), "a row tells which image was blank"


def test_an_evaluation_goes_on_where_it_was_stopped(
    checkpoint: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["--data", records, "--metrics", "exact_match", "--output", tmp_path / "stopped", "--batch-size", "2"]
    calls: list[int] = []
    answers = VisionLanguageModel.answers

    def stopped(self: VisionLanguageModel, inputs: Any, *rest: Any) -> list[str]:
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers(self, inputs, *rest)

    monkeypatch.setattr(VisionLanguageModel, "answers", stopped)
    with pytest.raises(SystemExit, match="the same command resumes it"):
        evaluate(checkpoint, *words)
    evaluate(checkpoint, *words)
    assert calls == [2, 2, 2, 2, 1], "two batches, the one that was stopped, and that again with the last record"
    evaluate(checkpoint, *words[:-3], tmp_path / "whole", "--batch-size", "2")
    whole, resumed = ((tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "stopped"))
    assert whole == resumed


def test_several_references_count(checkpoint: Path, records: Path, tmp_path: Path):
    """VQA's accuracy of what ten people said, of which three agree with the model."""
    first = json.loads(records.read_text())[0]
    said = first["conversations"][1]["value"]
    first["answers"] = [{"answer": said}] * 3 + [{"answer": "no"}] * 7
    one = records.with_name("one.json")
    one.write_text(json.dumps([first]))
    evaluate(checkpoint, "--data", one, "--metrics", "vqa_accuracy,exact_match", "--output", tmp_path)
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["vqa_accuracy"]["value"] == pytest.approx(0.9)
    assert metrics["exact_match"]["value"] == 1


def test_what_cannot_be_measured_is_refused_before_a_model_loads(checkpoint: Path, records: Path, tmp_path: Path):
    none = tmp_path / "nothing"  # no checkpoint: whoever loads it says so

    def get_refusal(*words: object) -> str:
        return refusal("eval", str(none), *map(str, words))

    assert "give --data for a file of records, or --tasks" in get_refusal()
    assert "--metrics meteor: allowed are exact_match" in get_refusal("--data", records, "--metrics", "meteor")
    assert "--data nowhere.json: no such file" in get_refusal("--data", "nowhere.json")
    assert "--retrieval-candidates 5: it needs --metrics retrieval" in get_refusal(
        "--data", records, "--retrieval-candidates", "5"
    )
    assert "--retrieval-candidates 1: at least 2" in get_refusal("--data", records, "--retrieval-candidates", "1")
    assert "--retrieval-candidates cannot be used with --tasks" in get_refusal(
        "--tasks", "mme", "--retrieval-candidates", "3"
    )
    assert "--limit cannot be used with --data" in get_refusal("--data", records, "--limit", "3")
    assert "--temperature cannot be used with --tasks" in get_refusal("--tasks", "mme", "--temperature", "1")
    assert "--limit 0: a number above 0" in get_refusal("--tasks", "mme", "--limit", "0")
    assert "--lmms-eval-python nowhere: no such file" in get_refusal("--tasks", "mme", "--lmms-eval-python", "nowhere")
    for name, content, reason in (
        ("empty.json", [], "the file has no records"),
        ("mute.json", json.loads(records.read_text())[7:], "loss needs records with replies"),
        (
            "bad.json",
            [{"id": "a"}],
            "none of the first 1 records can be read; record 0 ('a'): it has no `conversations`",
        ),
    ):
        path = records.with_name(name)
        path.write_text(json.dumps(content))
        assert reason in get_refusal("--data", path)
    said = get_refusal("--data", records.with_name("mute.json"), "--metrics", "exact_match")
    assert "end with no reply and list no `answers`" in said


def test_nothing_is_written_into_a_checkpoint(checkpoint: Path, records: Path):
    said = refusal("eval", str(checkpoint), "--data", str(records), "--output", str(checkpoint / "eval"))
    assert "this is inside the checkpoint" in said


def test_a_model_with_heads_is_refused(parts: Parts, records: Path, tmp_path: Path):
    body, processor = parts.model("clip", "llama")
    settings = [{"name": "warm", "loss": "", "pooling": "last", "task": "binary", "labels": ["no", "yes"]}]
    config = VLMPredictionConfig(body.config, heads=settings, media_token_ids=[processor.image_token_id])
    VLMForPrediction(config, body).save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    assert "has prediction heads" in refusal("eval", str(tmp_path / "final"), "--data", str(records))


# lmms-eval


@pytest.fixture
def other_python(tmp_path: Path) -> Callable[[dict[str, Any] | None], Path]:
    """A Python that stands in for one with lmms-eval: it keeps what it was told, and writes these results."""

    def made(results: dict[str, Any] | None) -> Path:
        (tmp_path / "results.json").write_text(json.dumps({"results": results}))
        script = tmp_path / "python"
        script.write_text(f"""\
#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
if sys.argv[1] == "-c":
    sys.exit(0)
(here / "told.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
if {results is not None}:
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1], "model")
    folder.mkdir()
    (folder / "1_results.json").write_text((here / "results.json").read_text())
""")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return script

    return made


def test_tasks_stand_beside_published_results(
    checkpoint: Path, other_python: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "secret")
    python = other_python({
        "gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.01, "samples": 4},
        "mine": {"acc,none": 0.25, "submission,none": None},
    })  # fmt: skip
    place = tmp_path / "out"
    main(list(map(str, [
        "eval", checkpoint, "--tasks", "gqa, mine", "--limit", "4", "--batch-size", "2", "--lmms-eval-python", python,
        "--output", place, "--include-path", tmp_path, "--dtype", "float32",
    ])))  # fmt: skip
    told, seen = json.loads((tmp_path / "told.json").read_text())
    assert told[:2] == ["-m", "lmms_eval"]
    options = dict(zip(told[2::2], told[3::2], strict=True))
    del options["--output_path"]
    assert options == {
        "--model": "vlm", "--model_args": f"pretrained={checkpoint},dtype=float32,max_frames=8", "--tasks": "gqa,mine",
        "--batch_size": "2", "--limit": "4", "--include_path": str(tmp_path),
    }  # fmt: skip
    assert "HF_TOKEN" not in seen, "lmms-eval prints it"
    assert seen["HUGGING_FACE_HUB_TOKEN"] == "secret"
    table = re.sub(" +", " ", (place / "results.md").read_text())
    assert "| gqa | exact_match | 0.5 | 0.01 | 0.6201 | 0.6192 |" in table
    assert json.loads((place / "results.json").read_text())["results"][1] == {
        "task": "mine", "metric": "acc", "value": 0.25, "error": None,
    }  # fmt: skip
    assert "0.6192" in capsys.readouterr().out


def test_a_failure_of_lmms_eval_is_one_here(checkpoint: Path, other_python: Callable[..., Path], tmp_path: Path):
    """It prints what went wrong and ends as if all were well."""
    said = refusal(
        "eval", str(checkpoint), "--tasks", "gqa", "--lmms-eval-python", str(other_python(None)),
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert "lmms-eval produced no results" in said
    assert not (tmp_path / "out").exists()


def test_a_python_without_lmms_eval_is_refused(checkpoint: Path, tmp_path: Path):
    said = refusal(
        "eval", str(checkpoint), "--tasks", "gqa", "--lmms-eval-python", sys.executable, "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert "lmms_eval is missing there; `make install-eval`" in said


def test_names_that_lmms_eval_would_misread_are_refused():
    assert format_model_args({"pretrained": "a/b", "base": "language_model=/x;connector=/y"}) == (
        "pretrained=a/b,base=language_model=/x;connector=/y"
    )
    with pytest.raises(ValueError, match="pretrained=a,b: lmms-eval cannot handle"):
        format_model_args({"pretrained": "a,b"})


def test_the_environment_is_otherwise_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert make_environment()["HF_HUB_OFFLINE"] == "1"
