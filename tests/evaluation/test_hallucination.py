"""POPE and CHAIR: the figures of the papers' formulas on small cases, and the questions that they are asked with."""

import pytest

from vlm.evaluation.hallucination import compute_hallucination_metrics, make_object_finder

POPE = {
    "pope_accuracy": 3 / 5, "pope_precision": 2 / 4, "pope_recall": 1, "pope_f1": 2 / 3, "pope_yes": 4 / 5,
    "pope_unclear": 1 / 5,
}  # fmt: skip


def test_pope_counts_as_the_paper_does():
    answers = ["Yes.", "Yes, a dog", "There is a cat.", "No, there isn't.", "yes"]
    references = [["yes"], ["no"], ["no"], ["No."], ["yes"]]
    blank = ["no"] * 5
    scores = compute_hallucination_metrics(["pope"], answers, blank, references, list("aabbc"))
    assert {name: score.value for name, score in scores.items() if not name.startswith("blank")} == pytest.approx(POPE)
    assert (scores["blank_pope_accuracy"].value, scores["blank_pope_precision"].value) == (3 / 5, None)
    accuracy = scores["pope_accuracy"]
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert 0.5 <= accuracy.low < accuracy.high <= 1, (
        "images are drawn: of two of them one question is right, of one all"
    )
    with pytest.raises(ValueError, match="pope: a reference is 'a dog'; yes or no is needed"):
        compute_hallucination_metrics(["pope"], ["yes"], ["no"], [["a dog"]], ["a"])


@pytest.mark.parametrize(
    ("answer", "says_yes"),
    [("Yes", 1), ("No.", 0), ("There isn't any dog", 0), ("It is not there", 0), ("A dog. No cat", 1), ("nothing", 1)],
)
def test_no_is_told_by_the_first_sentence(answer: str, says_yes: int):
    scores = compute_hallucination_metrics(["pope"], [answer], [answer], [["yes"]], ["a"])
    assert scores["pope_yes"].value == says_yes


def test_chair_counts_objects_that_are_not_there():
    references = [["dog|puppy", "cup"], ["cat"]]
    answers = ["A puppy and two dogs beside a cat.", "A cat."]
    scores = compute_hallucination_metrics(["chair"], answers, ["a cup", "a cup"], references, ["a", "b"])
    found = {name: score.value for name, score in scores.items() if not name.startswith("blank")}
    assert found == pytest.approx({"chair_i": 1 / 3, "chair_s": 1 / 2, "chair_recall": 2 / 3, "chair_objects": 1.5})
    assert (scores["blank_chair_i"].value, scores["blank_chair_s"].value) == (0.5, 0.5)
    nothing = compute_hallucination_metrics(["chair"], ["", ""], ["", ""], references, ["a", "b"])
    assert (nothing["chair_i"].value, nothing["chair_s"].value) == (None, 0)


def test_objects_are_found_as_whole_words_the_longest_first():
    find = make_object_finder(["dog|puppy", "hot dog", "baby", "bus", "dining table"])
    assert find("Puppies eat a hot dog on a Dining  table") == {"dog", "hot dog", "dining table"}
    assert find("two buses, babies; dogma and a busy street") == {"bus", "baby"}
    assert find("hot dogs") == {"hot dog"}
