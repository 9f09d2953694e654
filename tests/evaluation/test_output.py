"""What `vlm eval` and other readers of files refuse before a model loads."""

import json
from pathlib import Path

import pytest

from vlm.checks.weights import identify_weights
from vlm.config.dataset_schema import SourceConfig
from vlm.evaluation.output import check_no_results, read_first_samples, resolve_output_folder


def test_a_table_of_captions_is_told_its_format(tmp_path: Path):
    table = tmp_path / "captions.csv"
    table.write_text("file_name,text\na.png,A cat.\n")
    with pytest.raises(ValueError, match="none of the first 1 records can be read") as caught:
        read_first_samples(SourceConfig(path=str(table), format="labelled"), "--input")
    assert str(caught.value).startswith(f"--input {table}: ")
    assert str(caught.value).endswith("add --format caption --option image_key=file_name --option caption_key=text")


def test_prompts_without_answers_are_told_what_reads_them(tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "Which animal?"}) + "\n")
    with pytest.raises(ValueError, match="records can be read; record 0: it has no `conversations`") as caught:
        read_first_samples(SourceConfig(path=str(file)), "--input")
    assert "vlm generate and vlm predict read them with --format labelled --option prompt_key=question" in str(
        caught.value
    )
    (tmp_path / "a.png").touch()
    source = SourceConfig(path=str(file), format="labelled", options={"prompt_key": "question"})
    (sample,) = read_first_samples(source, "--input")
    assert "Which animal?" in str(sample.turns[0].content)


def test_a_missing_image_is_told_that_no_folder_was_given(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text("image,caption\nx.png,a cat\n")
    config = SourceConfig(path=str(file), format="caption")
    with pytest.raises(ValueError, match=r"does not exist; without --image-folder, image paths are relative to "):
        read_first_samples(config, "--data")


def test_records_that_can_be_read_are_returned(tmp_path: Path):
    file = tmp_path / "records.jsonl"
    good = {"conversations": [{"from": "human", "value": "Why?"}]}
    file.write_text(f"{json.dumps({'id': 1})}\n{json.dumps(good)}\n")
    (sample,) = read_first_samples(SourceConfig(path=str(file)), "--input")
    assert sample.turns[0].content == ("Why?",)


def test_results_are_named_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/run/final").mkdir(parents=True)
    assert resolve_output_folder("outputs/run/final", "val", None) == Path("outputs/run/eval/val")
    monkeypatch.chdir(tmp_path / "outputs/run/final")
    assert resolve_output_folder(".", "val", None) == tmp_path / "outputs/run/eval/val"


def test_a_refusal_says_that_results_are_of_other_weights(tmp_path: Path):
    final, folder = tmp_path / "final", tmp_path / "eval" / "val"
    folder.mkdir(parents=True)
    final.mkdir()
    (final / "model.safetensors").write_bytes(b"step 21")
    (folder / "results.json").write_text(json.dumps({"weights": identify_weights(str(final), final)}))
    with pytest.raises(ValueError, match="exists; choose another --output"):
        check_no_results(folder, str(final), overwrite=False)
    (final / "model.safetensors").write_bytes(b"step 28")
    with pytest.raises(ValueError, match=r"of weights that .*final no longer has"):
        check_no_results(folder, str(final), overwrite=False)
    check_no_results(folder, str(final), overwrite=True)
