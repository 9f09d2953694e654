"""The demo: how it counts, and, where there are minutes, that it learns what it says."""

import json
from pathlib import Path

import pytest

from vlm.demo.main import accuracy, constant_answer_accuracy, main


def make_record(kind: str, question: str, answer: str) -> dict:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"kind": kind, "conversations": talk}


RECORDS = [
    make_record("colour", "What colour?", "red"),
    make_record("colour", "What colour?", "red"),
    make_record("colour", "What colour?", "blue"),
    make_record("count", "How many?", "two"),
]


def test_accuracy_is_by_kind_and_over_all():
    assert accuracy(RECORDS, ["red", " red\n", "red", "one"]) == {"colour": 0.6667, "count": 0.0, "all": 0.5}


def test_the_best_constant_answer_is_the_commonest_of_each_question():
    assert constant_answer_accuracy(RECORDS) == {"colour": 0.6667, "count": 1.0, "all": 0.75}


@pytest.mark.slow
def test_the_demo_answers_about_pairs_that_it_has_never_seen(tmp_path: Path):
    main(["--output", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["accuracy"] >= 0.90
    assert summary["text_only_accuracy"] <= 0.40
    assert set(summary["accuracy_by_kind"]) == {"colour", "shape", "count", "place"}
    assert (tmp_path / "heldout.png").is_file()
