"""The question that the commands at the end of a run ask."""

import json
from pathlib import Path

from tests.runs.directories import write_samples
from tests.tiny_parts import Parts, picture
from vlm.config.dataset_schema import DatasetConfig
from vlm.data.dataset import SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.train.example_question import MAX_LENGTH, ExampleQuestion, find_example_question


def make_dataset(parts: Parts, folder: Path, name: str, *questions: str | None) -> SampleDataset:
    """Records with an image each, named after the data set and the record; one of text only for None."""
    records: list[dict[str, object]] = []
    for number, question in enumerate(questions):
        turns = [{"from": "human", "value": question or "hello"}, {"from": "gpt", "value": "red"}]
        record: dict[str, object] = {"id": str(number), "conversations": turns}
        if question is not None:
            picture(number).save(folder / f"{name}{number}.png")
            record["image"] = f"{name}{number}.png"
        records.append(record)
    (folder / f"{name}.json").write_text(json.dumps(records))
    config = DatasetConfig(path=str(folder / f"{name}.json"), image_folder=str(folder))
    return load_dataset(config, SampleEncoder(parts.processor(), 400, truncate=False))


def test_a_held_out_question_about_one_image_comes_first(parts: Parts, tmp_path: Path):
    train = make_dataset(parts, tmp_path, "train", "<image>\nIs it red?")
    long = f"<image>\n{'why ' * (MAX_LENGTH // 4)}?"
    held_out = make_dataset(parts, tmp_path, "eval", None, long, "<image>\nTwo\nlines?", "<image>\nIt's what colour?")
    found = find_example_question({"train": train, "eval": held_out}, tmp_path)
    assert found == ExampleQuestion(str(tmp_path / "eval3.png"), "It's what colour?")
    assert find_example_question({"train": train}, tmp_path).prompt == "Is it red?"
    of_text = make_dataset(parts, tmp_path, "text", None)
    assert find_example_question({"train": train, "eval": of_text}, tmp_path).prompt == "Is it red?"


def test_records_without_a_short_question_leave_that_of_a_sample(tmp_path: Path):
    assert find_example_question({}, tmp_path) == ExampleQuestion("FILE", None)
    write_samples(tmp_path, 10, ["red", "blue"])
    assert find_example_question({}, tmp_path) == ExampleQuestion(str(tmp_path / "samples" / "0.png"), "question 0")
    file = tmp_path / "samples.md"
    file.write_text(
        file.read_text().replace("question 0", "why " * MAX_LENGTH).replace("question 1", "why " * MAX_LENGTH)
    )
    assert find_example_question({}, tmp_path) == ExampleQuestion(str(tmp_path / "samples" / "0.png"), None)
