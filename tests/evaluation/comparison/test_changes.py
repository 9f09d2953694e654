"""Paired differences: the same as those of each record, with intervals that hold what they promise."""

from typing import Any

import numpy as np
import pytest

from vlm.evaluation.bootstrap import Score
from vlm.evaluation.comparison.changes import (
    LOSS,
    Change,
    Pair,
    compute_changes,
    paired_difference,
    units_of,
)
from vlm.evaluation.comparison.drift import compute_drift
from vlm.evaluation.comparison.measure import Measured
from vlm.evaluation.comparison.questions import question_kind
from vlm.evaluation.comparison.replay import propose_replay, weight_of_source
from vlm.evaluation.comparison.report import compare


def row(number: int, answer: str, loss: float, kind: str = "colour", **more: Any) -> Measured:
    groups = {"source": "val.json", "kind": kind}
    return Measured(f"r{number}", "held-out", groups, f"{number}.png", "?", ["red"], answer=answer, loss=loss, **more)


def make_pairs(number: int = 20) -> list[Pair]:
    """Records of two kinds: all of `colour` are learned, every other one of `shape` is forgotten."""
    pairs = []
    for index in range(number):
        pairs.append((row(index, "blue", 2.0), row(index, "red", 1.0 + index / 100)))
        after = row(index, "blue" if index % 2 else "red", 3.0 + index / 100, "shape")
        pairs.append((row(index, "red", 2.0, "shape"), after))
    return pairs


def find(changes: list[Change], split: str, group: str, measure: str, *, is_blank: bool = False) -> Change:
    (found,) = (c for c in changes if (c.split, c.group, c.measure, c.is_blank) == (split, group, measure, is_blank))
    return found


def test_each_group_has_its_own_difference():
    changes = compute_changes(make_pairs(), ["exact_match"])
    colour, shape = (find(changes, "kind", kind, "exact_match") for kind in ("colour", "shape"))
    assert (colour.before, colour.after, colour.num_better, colour.num_worse, colour.direction) == (0, 1, 20, 0, 1)
    assert (shape.before, shape.after, shape.num_better, shape.num_worse, shape.direction) == (1, 0.5, 0, 10, -1)
    low, high = shape.difference.low, shape.difference.high
    assert low is not None
    assert high is not None
    assert -0.8 < low < -0.5 < high < -0.2
    assert find(changes, "all", "all", "exact_match").difference.value == pytest.approx(0.25)
    assert find(changes, "kind", "shape", LOSS).direction == -1, "a loss that rises is worse"
    assert not [change for change in changes if change.is_blank], "no record was shown blank images"
    assert not [change for change in changes if change.split == "source"], "there is one source"


def test_a_metric_without_a_value_for_each_answer_is_refused():
    with pytest.raises(ValueError, match="bleu: it has no value for each answer"):
        compute_changes(make_pairs(2), ["bleu"])


def test_few_records_have_no_interval():
    difference = paired_difference(np.zeros(5), np.ones(5), np.arange(5))
    assert difference == Score(1.0)


def test_records_of_one_image_are_one_unit():
    assert units_of(["a.png", "", "a.png", "", "b.png"]).tolist() == [0, 1, 0, 2, 3]
    rng = np.random.default_rng(1)
    gains = rng.normal(size=30)
    copies = np.repeat(gains, 8)
    one = paired_difference(np.zeros(30), gains, np.arange(30))
    repeated = paired_difference(np.zeros(240), copies, np.repeat(np.arange(30), 8))
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((one.value, one.low, one.high))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        before, after = rng.normal(size=40), rng.normal(0.3, 1, size=40)
        found = paired_difference(before, after, np.arange(40))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 51 <= held <= 60, "of 60 intervals 57 are expected to hold it"


def test_drift_is_what_each_others_answers_cost():
    pairs = [
        (row(n, "red", 1, own_loss=0.5, other_loss=2.5), row(n, "blue" if n else "red", 1, own_loss=0.25, other_loss=1))
        for n in range(4)
    ]
    drift = compute_drift("held-out", pairs)
    assert (drift.num_records, drift.same_answers) == (4, 0.25)
    assert drift.on_before == Score(0.5)
    assert drift.on_after == Score(2.25)
    unmeasured = compute_drift("held-out", [(row(0, "a", 1, own_loss=1), row(0, "a", 1, own_loss=1))])
    assert (unmeasured.on_before, unmeasured.on_after) == (None, None)


def test_a_quarter_of_replay_is_proposed_for_a_clear_drop_of_any_size():
    proposal = propose_replay(compute_changes(make_pairs(), ["exact_match"]))
    assert proposal.drops == {"held-out, kind: shape": pytest.approx(0.5)}
    assert proposal.share == 0.25
    small = [(row(n, "red", 1.0), row(n, "red" if n % 12 else "blue", 1.0)) for n in range(200)]
    proposal = propose_replay(compute_changes(small, ["exact_match"]))
    assert proposal.drops == {"held-out, kind: colour": pytest.approx(0.085)}
    assert proposal.share == 0.25
    assert "Replay 25%: of 100 training samples, 25" in str(proposal)
    same = [(before, before) for before, _ in make_pairs()]
    assert "No replay is proposed" in str(propose_replay(compute_changes(same, ["exact_match"])))


def test_the_weight_of_a_source_gives_its_share():
    weight = weight_of_source(0.2, 800, 50)
    assert weight * 50 / (weight * 50 + 800) == pytest.approx(0.2)


def test_records_that_could_not_be_asked_are_left_out():
    pairs = make_pairs(4)
    before, after = (list(column) for column in zip(*pairs, strict=True))
    after[0] = Measured("r0", "held-out", error="image 0.png: no such file")
    comparison, places = compare(("a", "b"), before, after, ["exact_match"])
    assert comparison.left_out == [("r0", "image 0.png: no such file")]
    assert places == list(range(1, 8))
    assert [item.pair[0].groups["kind"] for item in comparison.worse][:2] == ["shape", "shape"]
    with pytest.raises(ValueError, match="none of 1 records could be used; the first: image"):
        compare(("a", "b"), before[:1], after[:1], ["exact_match"])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("How many dogs are there?", "count"), ("What colour is it?", "colour"), ("What does the sign say?", "text"),
        ("Where is the cat?", "place"), ("Is there a cat?", "yes/no"), ("Describe the image.", "description"),
        ("Which is right?\nA. one\nB. two", "choice"), ("Why is it wet?", "reason"), ("What is this?", "what"),
        ("Hello", "other"), (" ", "no text"),
    ],
)  # fmt: skip
def test_kinds_of_questions_are_told_by_their_words(text: str, kind: str):
    assert question_kind(text) == kind
