"""`vlm compare-models`: both models' figures of every record, tables that go on, and what is refused first."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.command_line import refusal
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts
from vlm import VisionLanguageModel
from vlm.cli.main import main
from vlm.evaluation.comparison.measure import Measurer

COLOURS = ["red", "green", "blue"]
TABLES = ("before", "after", "before-on-after")


@pytest.fixture(scope="module")
def models(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two complete models; the second one's vocabulary head differs."""
    folder, ready = tmp_path_factory.mktemp("models"), make_random_model(parts, "llama")
    places = [folder / name / "final" for name in ("first", "second")]
    for place in places:
        ready.model.save_pretrained(place)
        ready.processor.save_pretrained(place)
        with torch.no_grad():
            ready.model.get_output_embeddings().weight[:, ::2].mul_(-1)
    return places


@pytest.fixture(scope="module")
def records(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records: of four the reply is what the first model answers; one image is missing, one has no image."""
    folder = tmp_path_factory.mktemp("records")
    model, found = VisionLanguageModel.load(models[0], device="cpu"), []
    for number in range(12):
        image = f"{number}.png"
        Image.new("RGB", (30 + number, 24), COLOURS[number % 3]).save(folder / image)
        question = f"{('what', 'how many')[number % 2]}{' really' * (number % 3)}?"
        reply = model.generate(question, [folder / image], max_new_tokens=4) if number < 4 else "something"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        found.append({"id": f"r{number}", "image": image, "conversations": turns, "place": "north"})
    del found[11]["image"], found[11]["place"]
    found[11]["conversations"][0]["value"] = "what?"
    (folder / "6.png").unlink()
    (folder / "val.json").write_text(json.dumps(found))
    return folder / "val.json"


def compare(models: Sequence[Path], records: Path, output: Path, *words: str) -> None:
    options = ["--probe", "1", "--max-new-tokens", "4", "--device", "cpu", "--batch-size", "6", "--by", "place"]
    main(["compare-models", *map(str, models), "--data", str(records), "--output", str(output), *options, *words])


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(models: list[Path], records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    compare(models, records, folder)
    return folder


def test_answers_and_losses_are_those_of_the_models(models: list[Path], records: Path, compared: Path):
    tables = {name: read_table(compared, name) for name in TABLES}
    given = json.loads(records.read_text())
    for place, name in zip(models, TABLES, strict=False):
        ready = VisionLanguageModel.load(place, device="cpu")
        for number in (0, 5, 11):
            record, row = given[number], tables[name][number]
            images = [records.parent / record["image"]] if "image" in record else []
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            assert row["answer"] == ready.generate(question, images, max_new_tokens=4)
            assert row["loss"] == pytest.approx(loss_of(ready, question, images, row["references"][0]), rel=1e-4)
            if images:
                assert row["loss"] != row["blank_loss"]
            else:
                assert (row["blank_answer"], row["blank_loss"]) == (None, None)
    for number in range(4):
        before = tables["before"][number]
        assert before["answer"] == before["references"][0]
        assert before["own_loss"] == pytest.approx(before["loss"], rel=1e-4)


def loss_of(ready: VisionLanguageModel, question: str, images: Sequence[Path], reply: str) -> float:
    """The mean loss of a reply and its end, as the model itself computes it."""
    prompt = ready.inputs(*ready.conversations(question, images, (), 8)[:2])
    ids = ready.processor.tokenizer(f"{reply}{ready.reply_ending()}", add_special_tokens=False)["input_ids"]
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)
    labels = torch.full_like(whole, -100)
    labels[:, -len(ids) :] = whole[:, -len(ids) :]
    more = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return ready.model(input_ids=whole, labels=labels, **more).loss.item()


def test_each_model_is_asked_what_the_other_one_writes(models: list[Path], compared: Path):
    before, after, crossed = (read_table(compared, name) for name in TABLES)
    drift = {found["dataset"]: found for found in json.loads((compared / "results.json").read_text())["drift"]}
    rises = [second["other_loss"] - first["own_loss"] for first, second in zip(before, after, strict=True)
             if first["dataset"] == "held-out" and first["answer"] and not first["error"]]  # fmt: skip
    assert drift["held-out"]["on_before"]["value"] == pytest.approx(sum(rises) / len(rises))
    rises = [first["loss"] - second["own_loss"] for first, second in zip(crossed, after, strict=True)
             if second["dataset"] == "held-out" and second["answer"] and not second["error"]]  # fmt: skip
    assert drift["held-out"]["on_after"]["value"] == pytest.approx(sum(rises) / len(rises))


def test_everything_is_left_behind(compared: Path, capsys: pytest.CaptureFixture[str]):
    results = json.loads((compared / "results.json").read_text())
    (left_out,) = results["left_out"]
    assert left_out["id"] == "r6"
    groups = {(change["dataset"], change["split"], change["group"]) for change in results["changes"]}
    assert {("held-out", "kind", "what"), ("held-out", "kind", "count"), ("held-out", "place", "north")} <= groups
    assert {("probe", "kind", "reading"), ("probe", "kind", "absence"), ("probe", "all", "all")} <= groups
    worse = [json.loads(line) for line in (compared / "worse.jsonl").read_text().splitlines()]
    assert [row["id"] for row in worse][:2] != []
    assert all((row["score_before"] or 0) > (row["score_after"] or 0) for row in worse[:1])
    assert (compared / "worse.html").read_text().count("<section>") == len(worse)
    assert "data:image/jpeg" in (compared / "worse.html").read_text()
    report = (compared / "report.md").read_text()
    assert "![What moved](moved.png)" in report
    assert "1 records were not compared; the first: 'r6'" in report
    assert (compared / "moved.png").stat().st_size > 1000


def test_a_comparison_goes_on_where_it_was_stopped(
    models: list[Path], records: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measure, sizes = Measurer.measure, []

    def stopped(self: Measurer, part: Any, *rest: Any) -> Any:
        sizes.append(len(part))
        if len(sizes) == 5:
            raise KeyboardInterrupt
        return measure(self, part, *rest)

    monkeypatch.setattr(Measurer, "measure", stopped)
    with pytest.raises(SystemExit, match="the same command resumes it"):
        compare(models, records, tmp_path)
    compare(models, records, tmp_path)
    assert sizes == [6, 6, 6, 1, 6, 6, 6, 6, 1], "the model before was measured once"
    for name in TABLES:
        rows = zip(read_table(tmp_path, name), read_table(compared, name), strict=True)
        assert all({**one, "media": ""} == {**other, "media": ""} for one, other in rows)
    with pytest.raises(SystemExit, match="was made from another checkpoint, other records or other options"):
        compare(models[::-1], records, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--probe", "0"], "--probe 0 without --data leaves nothing to compare"),
        (["--probe", "-1"], "--probe -1: at least 0 is needed"),
        (["--data", "no.json"], "--data no.json: no such file"),
        (["--metrics", "iou"], "--metrics iou: allowed are exact_match"),
        (["--max-samples", "0"], "--max-samples 0: at least 1 is needed"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], said: str):
    assert said in refusal("compare-models", "a", "b", *words)
