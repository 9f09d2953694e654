"""Asking prediction heads: one prompt, several, a file of records that goes on where it was stopped."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.command_line import refusal
from tests.fixtures import quick_report
from tests.tiny_parts import Parts
from vlm import Predictor, VisionLanguageModel, VLMForPrediction, VLMPredictionConfig
from vlm.cli.main import main
from vlm.evaluation import predict_file as module

KINDS = ["red", "green", "blue"]
PROMPT = "what colour?"

HEADS: dict[str, dict[str, Any]] = {
    "kind": {"task": "multiclass", "labels": KINDS, "temperature": 2.0},
    "warm": {"task": "binary", "labels": ["no", "yes"], "threshold": 0.3},
    "tags": {"task": "multilabel", "labels": KINDS, "threshold": [0.2, 0.9, 0.5]},
    "size": {"task": "regression", "shift": 3.0, "scale": 2.0},
    "rank": {"task": "ordinal", "labels": [1, 2, 3]},
}


@pytest.fixture(autouse=True)
def few_resamples() -> Iterator[None]:
    """Metrics of predictions have intervals, of which only the form is looked at here."""
    with quick_report(plots=True):
        yield


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("kind", "warm")`: a folder with such heads, untrained, and the language model's own template."""
    root = tmp_path_factory.mktemp("heads")

    def folder(*names: str, pooling: str = "last") -> Path:
        place = root / "-".join([*names, pooling])
        if not place.exists():
            body, processor = parts.model("clip", "llama")
            query = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
            settings = [
                {"name": name, "loss": "", "pooling": pooling, "token_id": query, **HEADS[name]} for name in names
            ]
            suffix = {"suffix": "<|endoftext|>", "suffix_ids": [query]} if pooling == "query" else {}
            config = VLMPredictionConfig(
                body.config, heads=settings, media_token_ids=[processor.image_token_id], **suffix
            )
            torch.manual_seed(1)
            VLMForPrediction(config, body).save_pretrained(place)
            processor.save_pretrained(place)
        return place

    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Nine labelled records, of which one names an image that is not there, and one has no image."""
    found = []
    for number in range(9):
        image = f"{number}.png"
        if number not in (4, 7):
            Image.new("RGB", (30 + number, 24), KINDS[number % 3]).save(tmp_path / image)
        turn = {"from": "human", "value": PROMPT if number == 7 else f"<image>\n{PROMPT}{' really' * (number % 4)}"}
        found.append({
            "id": f"r{number}", "label": KINDS[number % 3], "conversations": [turn],
            **({} if number == 7 else {"image": image}),
        })  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(found))
    return tmp_path / "records.json"


def run_predict(*words: object) -> None:
    main(["predict", *map(str, words), "--num-workers", "0"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text().splitlines()]


# One prompt, several


@pytest.mark.parametrize("name", HEADS)
def test_what_is_said_is_what_the_model_says(checkpoint: Callable[..., Path], name: str):
    """The plain way, through the processor and the model, gives the same."""
    predictor = Predictor.load(checkpoint(name), device="cpu")
    image = Image.new("RGB", (40, 30), "red")
    said = predictor.predict(PROMPT, [image])
    chat = [{"role": "user", "content": f"{predictor.processor.image_token}\n{PROMPT}"}]
    text = predictor.processor.apply_chat_template(chat, add_generation_prompt=True)
    plain = predictor.model.predict(**predictor.processor(images=[image], text=text))[name]
    assert said.prediction == pytest.approx(plain["predictions"][0]) if name == "size" else True
    assert name == "size" or said.prediction == plain["predictions"][0]
    if said.probabilities:
        assert list(said.probabilities.values()) == pytest.approx(plain["scores"][0].tolist(), abs=1e-5)
    else:
        assert said.score == said.prediction


def test_several_prompts_are_answered_as_each_alone(checkpoint: Callable[..., Path]):
    predictor = Predictor.load(checkpoint("kind", "warm"), device="cpu")
    images = [Image.new("RGB", (30, 30), colour) for colour in KINDS]
    prompts = [PROMPT, f"{PROMPT} well?", f"say, {PROMPT}"]
    together = predictor.predict(prompts, [[one] for one in images])
    assert [set(one) for one in together] == [{"kind", "warm"}] * 3
    for prompt, image, said in zip(prompts, images, together, strict=True):
        alone = predictor.predict(prompt, [image])
        assert alone["kind"].outputs == pytest.approx(said["kind"].outputs, abs=1e-4)


def test_thresholds_and_temperature_decide(checkpoint: Callable[..., Path]):
    predictor = Predictor.load(checkpoint("kind", "warm", "tags"), device="cpu")
    said = predictor.predict(PROMPT, [Image.new("RGB", (30, 30), "blue")])
    logits = np.array(said["kind"].outputs) / 2.0
    assert list(said["kind"].probabilities.values()) == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=1e-5)
    assert said["warm"].prediction == ("yes" if said["warm"].score >= 0.3 else "no")
    assert said["warm"].score == said["warm"].probabilities["yes"]
    thresholds = dict(zip(KINDS, [0.2, 0.9, 0.5], strict=True))
    assert said["tags"].prediction == [k for k, p in said["tags"].probabilities.items() if p >= thresholds[k]]


def test_the_token_of_a_query_stands_behind_the_prompt(checkpoint: Callable[..., Path]):
    predictor = Predictor.load(checkpoint("kind", pooling="query"), device="cpu")
    assert predictor.predict(PROMPT, [Image.new("RGB", (30, 30))]).prediction in KINDS
    inputs = predictor.processor(images=[Image.new("RGB", (30, 30))], text=f"{predictor.processor.image_token} x")
    with pytest.raises(ValueError, match=r"row 0 has no token to read: the token of the head's query is missing"):
        predictor.model(**inputs)


def test_each_kind_of_checkpoint_says_how_it_is_asked(checkpoint: Callable[..., Path], parts: Parts, tmp_path: Path):
    with pytest.raises(ValueError, match="has prediction heads: ask it with vlm predict"):
        VisionLanguageModel.load(checkpoint("kind"))
    model, processor = parts.model("clip", "llama")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no prediction heads: ask it with vlm generate"):
        Predictor.load(tmp_path)


# A file of records


def test_a_file_becomes_a_table(checkpoint: Callable[..., Path], records: Path, capsys: pytest.CaptureFixture[str]):
    output = records.with_name("preds.csv")
    run_predict(checkpoint("kind"), "--input", records, "--output", output, "--batch-size", 4)
    rows = read_rows(output)
    assert list(rows[0]) == ["source", "image_path", "label", "score", "prediction", "error"]
    assert [row["source"] for row in rows] == [f"r{number}" for number in range(9)]
    assert [row["label"] for row in rows] == [KINDS[number % 3] for number in range(9)]
    assert rows[0]["image_path"] == str(records.with_name("0.png"))
    assert "4.png does not exist" in rows[4]["error"]
    assert (rows[4]["score"], rows[4]["prediction"], rows[7]["image_path"]) == ("", "", "")
    predictor = Predictor.load(checkpoint("kind"), device="cpu")
    for number in (0, 7):
        alone = predictor.predict(PROMPT, [] if number == 7 else [records.with_name("0.png")])
        assert rows[number]["prediction"] == alone.prediction
        assert float(rows[number]["score"]) == pytest.approx(alone.score, abs=1e-5)
    said = capsys.readouterr().out
    assert "kind (multiclass), 8 records with a label" in said
    assert "accuracy" in said
    assert f"9 records: {output}; 1 could not be read" in said
    assert not list(records.parent.glob("*partial*"))


def test_json_lines_hold_all_that_was_said(checkpoint: Callable[..., Path], records: Path):
    output = records.with_name("preds.jsonl")
    values = json.loads(records.read_text())
    for value in values:
        value["label"] = {"kind": value["label"], "size": 3}
    records.write_text(json.dumps(values))
    run_predict(checkpoint("kind", "size"), "--input", records, "--output", output)
    row = read_rows(output)[0]
    assert (row["label_kind"], row["label_size"]) == ("red", 3)
    assert row["prediction_kind"] in KINDS
    assert set(row["probabilities_kind"]) == set(KINDS)
    assert row["score_size"] == row["prediction_size"] == pytest.approx(row["outputs_size"][0])


def test_a_table_of_images_without_labels(checkpoint: Callable[..., Path], records: Path):
    table, output = records.with_name("new.csv"), records.with_name("preds.csv")
    table.write_text("file\n0.png\n1.png\n")
    options = ["--option", "image_key=file", "--option", f"prompt={PROMPT}"]
    run_predict(checkpoint("kind"), "--input", table, "--output", output, *options)
    rows = read_rows(output)
    assert [row["label"] for row in rows] == ["", ""]
    predictor = Predictor.load(checkpoint("kind"), device="cpu")
    assert rows[1]["prediction"] == predictor.predict(PROMPT, [records.with_name("1.png")]).prediction


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_stopped_run_goes_on(
    checkpoint: Callable[..., Path], records: Path, ending: str, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    whole, stopped = (records.with_name(f"{name}.{ending}") for name in ("whole", "stopped"))
    run_predict(checkpoint("kind"), "--input", records, "--output", whole, "--batch-size", 2)
    asked = []
    before = Predictor.of

    def of(self: Predictor, inputs: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return before(self, inputs)

    monkeypatch.setattr(Predictor, "of", of)
    command = [checkpoint("kind"), "--input", records, "--output", stopped, "--batch-size", 2]
    with pytest.raises(SystemExit, match="the same command resumes it"):
        run_predict(*command)
    partial = stopped.with_name(f"{stopped.name}.partial")
    assert not stopped.exists()
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:
        file.write('{"source": "torn')
    run_predict(*command)
    assert sum(asked[3:]) == 4  # of the five records left one has no image
    assert [row["source"] for row in read_rows(stopped)] == [row["source"] for row in read_rows(whole)]
    assert [row["prediction"] for row in read_rows(stopped)] == [row["prediction"] for row in read_rows(whole)]


def test_what_was_begun_with_something_else_is_refused(checkpoint: Callable[..., Path], records: Path):
    output = records.with_name("preds.csv")
    facts = module.ResumableTable(output, [], "another fingerprint")
    facts.begin_or_resume(overwrite=False)
    words = ["predict", str(checkpoint("kind")), "--input", str(records), "--output", str(output)]
    assert "was started with another checkpoint, other records or other options" in refusal(*words)
    main([*words, "--overwrite", "--num-workers", "0"])
    assert f"{output} exists; choose another --output" in refusal(*words)
    assert len(read_rows(output)) == 9


def test_a_label_that_the_head_does_not_know_is_said(
    checkpoint: Callable[..., Path], records: Path, capsys: pytest.CaptureFixture[str]
):
    records.write_text(records.read_text().replace('"red"', '"pink"'))
    output = records.with_name("preds.csv")
    run_predict(checkpoint("kind"), "--input", records, "--output", output)
    said = capsys.readouterr().out
    assert "3 of 8 labels are excluded from the metrics, the first is that of r0: head kind: 'pink' is not one" in said
    assert "kind (multiclass), 5 records with a label" in said
    assert len(read_rows(output)) == 9


def test_a_record_without_a_name_is_called_by_its_place(checkpoint: Callable[..., Path], records: Path):
    table, output = records.with_name("new.csv"), records.with_name("preds.csv")
    table.write_text("image,prompt\n0.png,what colour?\nnone.png,what colour?\n")
    run_predict(checkpoint("kind"), "--input", table, "--output", output)
    assert [row["source"] for row in read_rows(output)] == ["new.csv:0", "new.csv:1"]


REFUSED = {
    "nothing": ([], "give --prompt for one question, or --input and --output"),
    "both": (["--prompt", "x", "--input", "a.json"], "give --prompt for one question, or --input and --output"),
    "no output": (["--input", "a.json"], "--input and --output go together"),
    "no file": (["--input", "none.json", "--output", "x.csv"], "--input none.json: no such file"),
    "image of none": (["--prompt", "x", "--image", "none.png"], "image none.png does not open"),
    "batch": (["--prompt", "x", "--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_command_lines_are_refused(checkpoint: Callable[..., Path], name: str):
    words, said = REFUSED[name]
    assert said in refusal("predict", str(checkpoint("kind")), *words)


def test_wrong_outputs_and_options_are_refused(checkpoint: Callable[..., Path], records: Path):
    words = ["predict", str(checkpoint("kind")), "--input", str(records)]
    assert "it must end in .csv or .jsonl" in refusal(*words, "--output", "x.txt")
    assert "--format lava: allowed are llava" in refusal(*words, "--output", "x.csv", "--format", "lava")
    said = refusal(*words, "--output", "x.csv", "--format", "labelled", "--option", "imagekey=a")
    assert "--option imagekey=a: NAME=VALUE is needed; labelled takes image_key" in said


def test_one_prompt_is_answered_with_bars(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    main(["predict", str(checkpoint("kind", "size")), "--prompt", PROMPT, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kind: ")
    assert sum("█" in line for line in lines) >= 1
    assert lines[-1].startswith("size: ")


def test_another_head_on_the_same_body_is_another_checkpoint(checkpoint: Callable[..., Path]):
    """A small head may lie between the pieces of a large file that its fingerprint is made of."""
    predictor = Predictor.load(checkpoint("warm"), device="cpu")
    before = module.hash_heads(predictor)
    assert module.hash_heads(Predictor.load(checkpoint("warm"), device="cpu")) == before
    weight = next(predictor.model.heads.parameters())
    with torch.no_grad():
        weight[0, 0] += 1e-3
    changed = module.hash_heads(predictor)
    predictor.model.config.heads[0]["threshold"] = 0.4
    assert len({before, changed, module.hash_heads(predictor)}) == 3


def test_a_system_prompt_is_said_before_one_prompt_as_before_many(checkpoint: Callable[..., Path], tmp_path: Path):
    turn = {"from": "human", "value": PROMPT}
    (tmp_path / "one.json").write_text(json.dumps([{"id": "a", "conversations": [turn]}]))
    output = tmp_path / "out.jsonl"
    run_predict(
        checkpoint("size"), "--input", tmp_path / "one.json", "--output", output, "--system-prompt", "Be brief."
    )
    predictor = Predictor.load(checkpoint("size"), device="cpu")
    said = predictor.predict(PROMPT, system_prompt="Be brief.")
    assert read_rows(output)[0]["outputs"] == pytest.approx(said.outputs, abs=1e-5)
    assert said.outputs != pytest.approx(predictor.predict(PROMPT).outputs, abs=1e-5)
