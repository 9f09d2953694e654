"""Certificates: written beside a checkpoint, read while its files are what they were, and shown in its card."""

from dataclasses import replace
from pathlib import Path

import pytest

from vlm.hub.card import model_card
from vlm.hub.certificates import (
    CERTIFICATE_FILE,
    Certificate,
    ComparedStage,
    add_certificate,
    fingerprint_files,
    read_certificates,
)
from vlm.hub.folders import read_json, write_json
from vlm.hub.run_facts import RunSummary


def make_certificate(folder: Path, **fields: object) -> Certificate:
    stages = [ComparedStage("pixels", 3, 0.0, 0.02), ComparedStage("logits", 3, 2.5e-6, 1e-3)]
    known = Certificate(
        "transformers 5.23.0", True, None, None, stages, 200, 199, 1, "float32", "2026-11-30", "0.1.0",
        fingerprint_files(folder), ["a note"],
    )  # fmt: skip
    return replace(known, **fields)


@pytest.fixture
def final(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_engines_have_a_certificate_each(final: Path):
    file = final / CERTIFICATE_FILE
    add_certificate(file, "vllm", make_certificate(final, engine="vLLM", is_run=False))
    add_certificate(file, "transformers", make_certificate(final, difference="old"))
    add_certificate(file, "transformers", make_certificate(final))
    assert [found.engine for found in read_certificates(final)] == ["transformers 5.23.0", "vLLM"]
    assert read_certificates(final)[0] == make_certificate(final)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_changed_file_makes_a_certificate_stale(final: Path, name: str):
    add_certificate(final / CERTIFICATE_FILE, "transformers", make_certificate(final))
    assert len(read_certificates(final)) == 1
    (final / name).write_text("[]")
    assert read_certificates(final) == []


def test_entries_of_another_version_are_passed_over(final: Path):
    add_certificate(final / CERTIFICATE_FILE, "transformers", make_certificate(final))
    entries = read_json(final / CERTIFICATE_FILE)
    for other in ({"fingerprint": fingerprint_files(final)}, 1, entries["transformers"] | {"new": 1}):
        write_json(final / CERTIFICATE_FILE, entries | {"vllm": other})
        assert read_certificates(final) == [make_certificate(final)]


@pytest.mark.parametrize(
    "fields",
    [{"engine": "[a](http://b)"}, {"engine": "a\n| b |"}, {"date": "<img src=x>"}, {"answers": "many"}],
    ids=str,
)
def test_nothing_that_others_wrote_comes_alive_in_a_card(final: Path, fields: dict[str, object]):
    add_certificate(final / CERTIFICATE_FILE, "vllm", make_certificate(final, **fields))
    assert read_certificates(final) == []


def test_rows_say_what_was_compared_and_what_was_not_run(final: Path):
    assert make_certificate(final).row() == (
        "transformers 5.23.0", "pixels, logits", "2.5e-06", "199 of 200 equal, 1 tied", "2026-11-30",
    )  # fmt: skip
    paper = make_certificate(final, engine="vLLM 1", is_run=False, stages=[], answers=0)
    assert paper.row() == ("vLLM 1, on paper: not run", "names, shapes, settings", "–", "–", "2026-11-30")
    different = make_certificate(final, difference="'a secret' instead of 'b'", different_stage="ids")
    assert different.row()[1] == "differs: ids"


def test_the_card_shows_them(final: Path):
    body = {"model_type": "qwen2_vl"}
    card = model_card(body, body, RunSummary(final), {"total": 1}, repo="a/b", licence=None,
                      certificates=[make_certificate(final)])  # fmt: skip
    assert "## Served as trained" in card
    assert "| transformers 5.23.0 | pixels, logits | 2.5e-06 | 199 of 200 equal, 1 tied | 2026-11-30 |" in card
    assert "Served as trained" not in model_card(body, body, RunSummary(final), {"total": 1}, repo="a/b", licence=None)
