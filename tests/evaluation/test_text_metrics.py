"""Metrics of answers against values worked out by hand and published examples."""

import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from vlm.config.named import permit_names
from vlm.evaluation.text_metrics import (
    ALL_METRICS,
    METRIC_MODULES,
    METRICS,
    bleu,
    check_metrics,
    cider,
    compute_text_metrics,
    normalize_vqa_answer,
)


def one(metric: str, answer: str, *references: str) -> float:
    """A metric of a single answer."""
    found = METRICS[metric]([answer], [list(references)])
    return found if isinstance(found, float) else float(found[0])


@pytest.mark.parametrize(("answer", "references", "value"), [
    ("Green", ["green"], 1), (" green.\n", ["red", "Green"], 1), ("green!", ["green"], 0), ("", ["green"], 0),
    ("the cat", ["cat"], 0), ("STRASSE", ["straße"], 1),
])  # fmt: skip
def test_exact_match(answer: str, references: Sequence[str], value: float):
    assert one("exact_match", answer, *references) == value


@pytest.mark.parametrize(("people", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_official_one_of_ten_people(people: int, value: float):
    """Of those who said it each is left out once: 3 of 10 give (3 x 2/3 + 7 x 1) / 10."""
    assert one("vqa_accuracy", "two", *["2"] * people, *["many"] * (10 - people)) == pytest.approx(value)


def test_vqa_accuracy_of_few_people():
    assert one("vqa_accuracy", "a cat", "The cat.") == 1
    assert one("vqa_accuracy", "dog", "cat") == 0
    assert one("vqa_accuracy", "cat", "cat", "cat") == 1
    assert one("vqa_accuracy", "cat", "cat", "dog") == 0.5  # with the cat left out nobody said it


@pytest.mark.parametrize(("text", "normalised"), [
    ("The two dogs!", "2 dogs"), ("None", "0"), ("1,000", "1000"), ("3.5", "3.5"), ("u.s.", "us"),
    ("red/green", "red green"), ("red / green", "red green"), ("yes, sir", "yes sir"), ("dont", "don't"),
    ("couldn'tve", "couldn't've"), ("its well", "its well"), ("An  apple\nand the\tpear", "apple and pear"),
    ("$1,000-2", "$10002"),
])  # fmt: skip
def test_answers_are_normalised_as_vqa_does(text: str, normalised: str):
    assert normalize_vqa_answer(text) == normalised


@pytest.mark.parametrize(("answer", "references", "value"), [
    ("Hello", ["hello"], 1.0), ("helo", ["hello"], 0.8), ("abcd", ["abxy"], 0.0), ("abc", ["abd", "abcx"], 0.75),
    ("", ["x"], 0.0),
])  # fmt: skip
def test_anls(answer: str, references: Sequence[str], value: float):
    """1 less the distance over the longer length; nothing from a half on."""
    assert one("anls", answer, *references) == pytest.approx(value)


def test_cider_by_hand():
    """Words of one of two references weigh log 2; a copy gives 10, half of the words in a row less by their share."""
    copies = cider(["a red cat", "the blue dog"], [["A red cat."], ["the blue dog"]])
    assert copies == pytest.approx([7.5, 7.5])  # of 1- to 4-grams, three words have no 4-gram
    references = [["one two three four five"], ["six seven eight nine"]]
    full, part = cider(["one two three four five", "six seven eight ten"], references)
    assert full == pytest.approx(10.0)
    # Of the words 3 in 4 are the reference's, of pairs 2 in 3, of triples 1 in 2, of fours none; an n-gram that no
    # reference has weighs log 2 too.
    assert part == pytest.approx(10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_cider_of_a_single_record_says_nothing():
    assert cider(["a cat"], [["a cat"]]).tolist() == [0.0]
    assert len(cider([], [])) == 0


def test_bleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and, smoothed, 1/6 of the example "the cat the cat on the mat"."""
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100.0)
    found = bleu(["the cat is on the mat"], [["the cat sat on the mat"]])
    expected = exp((log(5 / 6) + log(3 / 5) + log(1 / 4) + log(1 / 2 / 3)) / 4)
    assert found == pytest.approx(100 * expected, rel=1e-6)


def test_bleu_of_answers_without_four_words_is_of_shorter_ngrams():
    references = [["a red circle"], ["blue"]]
    assert bleu(["a red circle", "blue"], references) == pytest.approx(100.0)
    assert 0 < bleu(["a red square", "blue"], references) < 100
    assert bleu(["no", "none"], references) == 0


def test_bleu_takes_as_many_references_as_each_answer_has():
    found = bleu(["the cat sat on the mat", "a dog"], [["no", "the cat sat on the mat"], ["a dog"]])
    assert found == pytest.approx(100.0)


@pytest.mark.parametrize(("answer", "references", "value"), [
    ("police kill the gunman", ["police killed the gunman"], 3 / 4),
    ("the gunman kill police", ["police killed the gunman"], 2 / 4),
    ("gunman police killed", ["police killed the gunman"], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
    ("a cat", ["a dog", "A cat!"], 1.0),
    ("", ["a dog"], 0.0),
])  # fmt: skip
def test_rouge_gives_the_examples_of_its_paper(answer: str, references: Sequence[str], value: float):
    """Lin 2004, section 3.1: of two answers with the same words, the one in the reference's order is better."""
    assert one("rouge", answer, *references) == pytest.approx(value)


def test_means_have_intervals_and_measures_of_all_together_have_none():
    answers, references = ["a", "b", "c", "d"] * 5, [["a"], ["b"], ["x"], ["d"]] * 5
    found = compute_text_metrics(["exact_match", "bleu"], answers, references)
    assert found["exact_match"].value == 0.75
    low, high = found["exact_match"].low, found["exact_match"].high
    assert low is not None
    assert high is not None
    assert low < 0.75 < high
    assert (found["bleu"].low, found["bleu"].high) == (None, None)
    quick = compute_text_metrics(["exact_match"], answers, references, intervals=False)
    assert (quick["exact_match"].value, quick["exact_match"].low) == (0.75, None)


@pytest.mark.parametrize("name", METRICS)
def test_no_answers_give_no_value(name: str):
    assert compute_text_metrics([name], [], [])[name].value is None


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_tells_a_copy_from_something_else(name: str):
    references = [["a black cat sleeps on the mat"], ["two dogs run in a field"], ["the red bus stops here today"]]
    copies, others = [one[0] for one in references], ["nothing of this", "like that at all", "completely wrong 7"]
    good, bad = (np.mean(METRICS[name](given, references)) for given in (copies, others))
    assert good > bad


def test_what_is_unknown_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"--metrics meteor: allowed are exact_match, .*, loss"):
        check_metrics(["loss", "meteor"], ALL_METRICS, "--metrics ")
    with pytest.raises(ValueError, match=r"--metrics exactmatch: allowed are .* your own. Did you mean exact_match\?$"):
        check_metrics(["exactmatch"], ALL_METRICS, "--metrics ")
    for name, module in METRIC_MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"is not installed: pip install 'small-vlm\[eval\]'"):
            check_metrics([name], ALL_METRICS, "--metrics ")


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of a user's, found in the working directory."""
    (tmp_path / "own_metrics.py").write_text(
        "def num_words(answers, references):\n    return [len(answer.split()) for answer in answers]\n"
        "def share_of_yes(answers, references):\n    return answers.count('yes') / len(answers)\n"
        "def bleu(answers, references):\n    return 1.0\n"
        "def torn(answers, references):\n    return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)


def test_a_metric_of_the_users_own_is_named(own_metrics: None):
    names = ["own_metrics:num_words", "own_metrics:share_of_yes", "exact_match"]
    permit_names(names)
    check_metrics(names, ALL_METRICS, "--metrics ")
    scores = compute_text_metrics(names, ["yes", "a red cat"], [["yes"], ["a cat"]])
    assert {name: score.value for name, score in scores.items()} == {
        "num_words": 2.0, "share_of_yes": 0.5, "exact_match": 0.5
    }  # fmt: skip
    assert scores["num_words"].low is not None
    assert scores["share_of_yes"].low is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["own_metrics:word"], "--metrics=own_metrics:word: module 'own_metrics' has no attribute 'word'"),
        (["no_such_module:word"], "--metrics=no_such_module:word: No module named 'no_such_module'"),
        (["bleu", "own_metrics:bleu"], "--metrics bleu: two metrics have the name bleu"),
        (["meteor"], f"--metrics meteor: allowed are {', '.join(ALL_METRICS)}, or package.module:function for your"),
    ],
)
def test_a_name_of_no_metric_is_refused(own_metrics: None, names: list[str], message: str):
    permit_names(names)
    with pytest.raises(ValueError, match="metric") as error:
        check_metrics(names, ALL_METRICS, "--metrics ")
    assert str(error.value).startswith(message)


def test_values_for_some_answers_are_refused(own_metrics: None):
    permit_names(["own_metrics:torn"])
    with pytest.raises(ValueError, match=r"own_metrics:torn: it returned values of shape \(1,\) for 2 answers"):
        compute_text_metrics(["own_metrics:torn"], ["a", "b"], [["a"], ["b"]])
