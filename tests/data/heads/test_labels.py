"""Labels: which there are, what numbers they become, and how records are divided by them."""

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlm.data.heads.labels import (
    MIN_STRATUM_SIZE,
    HeadLabels,
    check_values,
    label_mean_and_std,
    make_folds,
    resolve_labels,
    split,
    strata,
)

NAN = float("nan")


def head(task: str, *labels: Any) -> HeadLabels:
    return HeadLabels("h", task, labels)


# Targets


TARGETS: dict[str, tuple[HeadLabels, Any, list[float]]] = {
    "binary": (head("binary", "no", "yes"), "yes", [1]),
    "numbers": (head("binary", 0, 1), 0, [0]),
    "a whole number as a table has it": (head("multiclass", 1, 3), 3.0, [1]),
    "truth": (head("binary", False, True), True, [1]),
    "multiclass": (head("multiclass", "a", "b", "c"), "c", [2]),
    "ordinal": (head("ordinal", "low", "mid", "high"), "mid", [1]),
    "multilabel": (head("multilabel", "a", "b", "c"), ["c", "a", "a"], [1, 0, 1]),
    "multilabel of none": (head("multilabel", "a", "b"), [], [0, 0]),
    "regression": (head("regression"), 2.5, [2.5]),
    "regression from a table": (head("regression"), " -2.50", [-2.5]),
    "a number from a table": (head("ordinal", 1, 2, 10), "10", [2]),
    "a number for a text": (head("multiclass", "007", "7"), 7, [1]),
    "truth from a table": (head("binary", False, True), "TRUE", [1]),
    "truth for a text": (head("binary", "False", "True"), True, [1]),
    "pairwise": (head("pairwise"), -3, [-3]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_value_becomes_numbers(name: str):
    one, value, numbers = TARGETS[name]
    assert one.target(value) == numbers
    assert len(numbers) == one.width
    missing = one.target(None)
    assert len(missing) == one.width
    assert all(map(math.isnan, missing))


WRONG: dict[str, tuple[HeadLabels, Any, str]] = {
    "unknown": (head("multiclass", "a", "b"), "c", "head h: 'c' is not one of its labels, which are 'a', 'b'"),
    "text for a number": (head("binary", 0, 1), "one", "head h: 'one' is not one of its labels, which are 0, 1"),
    "another number": (head("binary", 0, 1), "01.5", "head h: '01.5' is not one of its labels, which are 0, 1"),
    "truth for a number": (head("binary", 0, 1), True, "head h: True is not one of its labels, which are 0, 1"),
    "number for truth": (head("binary", False, True), 1, "head h: 1 is not one of its labels, which are False, True"),
    "a list for one": (head("multiclass", "a", "b"), ["a"], "head h: ['a'] is not one of its labels"),
    "a mapping": (head("ordinal", "a", "b"), {"a": 1}, "head h: {'a': 1} is not one of its labels"),
    "no number": (head("ordinal", 1, 2), NAN, "head h: nan is not one of its labels"),
    "many": (head("multiclass", *range(30)), 99, "18, 19, …"),
    "one for a list": (
        head("multilabel", "a"),
        "a",
        "head h: multilabel needs a list of labels, got 'a'; dataset.form",
    ),
    "unknown in a list": (head("multilabel", "a"), ["a", "b"], "head h: 'b' is not one of its labels, which are 'a'"),
    "null in a list": (head("multilabel", "a"), [None], "head h: None is not one of its labels"),
    "nan": (head("regression"), NAN, "head h: regression needs a finite number, got nan"),
    "inf": (head("pairwise"), float("-inf"), "head h: pairwise needs a finite number, got -inf"),
    "too large": (head("regression"), 10**400, "head h: regression needs a finite number, got 1000"),
    "truth for regression": (head("regression"), True, "head h: regression needs a finite number, got True"),
    "text for regression": (head("regression"), "NA", "got 'NA'; in a table, only an empty cell is a missing label"),
    "text nan": (head("regression"), "nan", "head h: regression needs a finite number, got 'nan'"),
    "underscores": (head("regression"), "1_000", "head h: regression needs a finite number, got '1_000'"),
    "a list for regression": (head("regression"), [3], "head h: regression needs a finite number, got [3]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_is_no_label_is_refused(name: str):
    one, value, said = WRONG[name]
    with pytest.raises(ValueError, match=r"^head h: ") as caught:
        one.target(value)
    assert said in str(caught.value)


# Which labels there are


SETTLED: dict[str, tuple[str, list[Any] | None, list[Any], tuple[Any, ...]]] = {
    "zero and one": ("binary", None, [1, 0, None, 1], (0, 1)),
    "zero and one of a table": ("binary", None, [1.0, 0.0], (0, 1)),
    "classes that look missing": ("multiclass", None, ["NA", "None", "null", None], ("NA", "None", "null")),
    "classes as written": ("multiclass", None, ["7", "007", "10", "7"], ("007", "7", "10")),
    "steps of a table": ("ordinal", None, ["10", "2", "1.0"], (1, 2, 10)),
    "steps of a table and of JSON": ("ordinal", None, ["10", 2], (2, 10)),
    "numbers of a table and of JSON": ("multiclass", None, ["1", 1, 2.0], (1, 2)),
    "truth of a table and of JSON": ("binary", None, ["True", False], (False, True)),
    "listed numbers of a table": ("ordinal", [1, 2, 3], ["3", "2", "1"], (1, 2, 3)),
    "zero and one as text": ("binary", None, ["1", "0"], ("0", "1")),
    "truth": ("binary", None, [True, False], (False, True)),
    "truth as text": ("binary", None, ["True", "false"], ("false", "True")),
    "yes and no": ("binary", None, ["Yes", "no", "no"], ("no", "Yes")),
    "positive": ("binary", None, ["POSITIVE", "Negative"], ("Negative", "POSITIVE")),
    "any pair": ("binary", ["ham", "spam"], ["spam", "ham"], ("ham", "spam")),
    "turned round": ("binary", [1, 0], [0, 1], (1, 0)),
    "alphabetical": ("multiclass", None, ["b", "a", "c", "a"], ("a", "b", "c")),
    "numerical": ("multiclass", None, [10, 9, 2], (2, 9, 10)),
    "numerical in a table": ("multiclass", None, [10.0, None, 9.0], (9, 10)),
    "halves": ("multiclass", None, [1, 0.5], (0.5, 1.0)),
    "as given": ("multiclass", ["b", "a"], ["a", "b"], ("b", "a")),
    "grades": ("ordinal", None, [3, 1, 2, 10], (1, 2, 3, 10)),
    "grades by name": ("ordinal", ["low", "high"], ["high", "low"], ("low", "high")),
    "sets": ("multilabel", None, [["b"], [], ["a", "b"], None], ("a", "b")),
    "sets of one": ("multilabel", None, [["a"], []], ("a",)),
    "sets as given": ("multilabel", ["b", "a"], [["a"], ["b"]], ("b", "a")),
    "regression": ("regression", None, [1, 2.5, None], ()),
    "pairwise": ("pairwise", None, [1, -1], ()),
}


@pytest.mark.parametrize("name", SETTLED)
def test_labels_are_those_of_the_training_records(name: str):
    task, given, values, labels = SETTLED[name]
    found = resolve_labels("h", task, given, values)
    assert (found.name, found.task, found.labels) == ("h", task, labels)
    assert [type(label) for label in found.labels] == [type(label) for label in labels]
    assert json.loads(json.dumps(found.labels)) == list(labels)


UNSETTLED: dict[str, tuple[str, list[Any] | None, list[Any], str]] = {
    "no label": ("binary", None, [None, None], "head h: no training record has a label. It is looked for in `label` of "
                 "each record; dataset.options.label_key=KEY, of dataset.format=labelled, names another key"),
    "no record": ("regression", None, [], "head h: no training record has a label"),
    "an unknown pair": ("binary", None, ["spam", "ham"], "head h: which of 'ham' and 'spam' is the positive "
                        "label is unknown; set model.head.labels=[negative, positive]"),
    "another pair of numbers": ("binary", None, [1, 2], "which of 1 and 2 is the positive label is unknown"),
    "one label": ("binary", None, [1, 1], "head h: binary needs exactly 2 labels, the training records have 1: 1"),
    "three labels": ("binary", None, ["no", "yes", "Yes"],
                     "head h: binary needs exactly 2 labels, the training records have 3: 'Yes', 'no', 'yes'"),
    "three given": ("binary", [0, 1, 2], [0], "head h: binary needs exactly 2 labels, model.head.labels has 3: 0, 1,"),
    "one class": ("multiclass", None, ["a"], "head h: multiclass needs at least 2 labels, the training records have 1"),
    "one grade": ("ordinal", None, [1], "head h: ordinal needs at least 2 labels"),
    "no set": ("multilabel", None, [[], []],
               "head h: multilabel needs at least 1 label, the training records have 0: none"),
    "text for sets": ("multilabel", None, ["a", ["b"]], "head h: multilabel needs a list of labels, got 'a'"),
    "kinds": ("multiclass", None, [1, "a"], "head h: its labels are numbers and texts, but one kind is needed: 1, 'a'"),
    "truth and numbers": ("multiclass", None, [True, 0], "its labels are numbers and truth values, but one"),
    "kinds given": ("multiclass", ["a", 1], ["a"], "head h: its labels are numbers and texts, but one kind is needed"),
    "a list": ("multiclass", None, [["a"]], "a label must be a text, a finite number, true or false, got ['a']"),
    "nan": ("multiclass", None, [1, NAN], "head h: a label must be a text, a finite number, true or false, got nan"),
    "a mapping": ("multilabel", None, [[{"a": 1}]], "a label must be a text, a finite number, true or false, got {"),
    "grades of text": ("ordinal", None, ["low", "high"], "head h: the order of the labels 'high', 'low' is unknown; "
                       "set model.head.labels=[lowest, …, highest]"),
    "an unknown label": ("multiclass", ["a", "b"], ["a", "b", "c", "c"],
                         "training records: head h: 'c' is not one of its labels, which are 'a', 'b' (2 of 4 records)"),
    "unknown labels": ("multiclass", ["a", "b"], ["d", "c", "c"], "(2 of 3 records; 1 more with other wrong values)"),
    "an absent label": ("multiclass", ["a", "b", "c", "d"], ["a", "b"],
                        "head h: model.head.labels has 'c', 'd', but no training record"),
    "an absent one of sets": ("multilabel", ["a", "b"], [["a"], []], "model.head.labels has 'b', but no training"),
    "twice": ("multiclass", ["a", "b", "a"], ["a"], "head h: the label 'a' occurs twice"),
    "twice as a number": ("multiclass", [1, 1.0], [1], "head h: the label 1 occurs twice"),
    "labels of numbers": ("regression", [1, 2], [1, 2],
                          "head h: model.head.labels=[1, 2]: regression learns numbers and has no labels"),
    "no number": ("regression", None, [1, "two"],
                  "training records: head h: regression needs a finite number, got 'two'; in a table, only an empty "
                  "cell is a missing label (1 of 2 records)"),
    "truth for a number": ("pairwise", None, [True], "head h: pairwise needs a finite number, got True"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSETTLED)
def test_labels_that_cannot_be_settled_say_why(name: str):
    task, given, values, said = UNSETTLED[name]
    with pytest.raises(ValueError, match="head h: ") as caught:
        resolve_labels("h", task, given, values)
    assert said in str(caught.value)


def test_another_set_has_no_other_labels():
    one = head("multiclass", "a", "b")
    check_values(one, ["a", None, "b"], "evaluation records")
    with pytest.raises(ValueError, match=r"^evaluation records: head h: 'c' is not one of its labels, .* \(1 of 3 rec"):
        check_values(one, ["a", "c", None], "evaluation records")


def test_how_numbers_are_spread():
    assert label_mean_and_std([1, None, 3.0]) == (2.0, 1.0)
    for values in ([0.1] * 3, [None, 2]):
        with pytest.raises(ValueError, match=r"all labels are equal \((0.1|2.0)\): nothing to learn"):
            label_mean_and_std(values)
    with pytest.raises(ValueError, match=r"all labels are equal \(there is none\)"):
        label_mean_and_std([None])


# Dividing


def test_strata_of_labels_are_their_numbers():
    assert strata(head("multiclass", "a", "b"), ["b", "a", None, "b"]).tolist() == [1, 0, 2, 1]
    assert strata(head("binary", 0, 1), [1, 0, 0]).tolist() == [1, 0, 0]
    assert strata(head("ordinal", 1, 2, 3), [3, 1]).tolist() == [2, 0]
    assert strata(head("pairwise"), [5, 6, None]).tolist() == [0, 0, 0]


def test_strata_of_numbers_are_parts_of_their_range():
    values = [float(number) for number in np.random.default_rng(0).permutation(400)]
    found = strata(head("regression"), values)
    assert [found[values.index(edge)] for edge in (0, 39, 40, 399)] == [0, 0, 1, 9]
    assert Counter(found.tolist()) == dict.fromkeys(range(10), 40)
    assert len(set(strata(head("regression"), values[:60]).tolist())) == 3
    assert set(strata(head("regression"), [1.0, 2.0, None]).tolist()) == {0}
    assert set(strata(head("regression"), [None]).tolist()) == {1}
    ties = strata(head("regression"), [0] * 99 + [1])
    assert min(Counter(ties.tolist()).values()) >= MIN_STRATUM_SIZE, "values of which many are equal"


def test_a_stratum_of_sets_is_that_of_their_rarest_frequent_label():
    one = head("multilabel", "common", "rare", "once")
    values = [["common"]] * 60 + [["common", "rare"]] * 30 + [["common", "once"]] + [[]] * 29 + [None]
    found = strata(one, values)
    assert Counter(found.tolist()) == {0: 61, 1: 30, 3: 30}
    assert found[90] == 0, "a label that one record has makes no stratum"
    assert set(strata(one, values[:5]).tolist()) == {3}


def test_a_share_of_each_label_is_held_out():
    of = np.array([0] * 80 + [1] * 20)
    rest, held = split(of, 0.25, seed=1)
    assert sorted([*rest, *held]) == list(range(100))
    assert rest.tolist() == sorted(rest)
    assert held.tolist() == sorted(held)
    assert Counter(of[held].tolist()) == {0: 20, 1: 5}
    assert split(of, 0.25, seed=1)[1].tolist() == held.tolist()
    assert split(of, 0.25, seed=2)[1].tolist() != held.tolist()


def test_groups_stay_together():
    groups = np.repeat(np.arange(10), 3)
    rest, held = split(np.zeros(30), 0.2, 0, groups)
    assert len(held) == 6
    assert not set(groups[rest]) & set(groups[held])
    parts = make_folds(np.zeros(30), 5, 0, groups)
    assert sorted(place for _, held in parts for place in held) == list(range(30))
    assert not any(set(groups[rest]) & set(groups[held]) for rest, held in parts)
    assert [held.tolist() for _, held in make_folds(np.zeros(30), 5, 1, groups)] != [held.tolist() for _, held in parts]


def test_folds_have_as_much_of_each_label():
    of = np.array([0] * 40 + [1] * 10)
    parts = make_folds(of, 5, seed=0)
    assert sorted(place for _, held in parts for place in held) == list(range(50))
    assert all(Counter(of[held].tolist()) == {0: 8, 1: 2} for _, held in parts)
    assert all(sorted([*rest, *held]) == list(range(50)) for rest, held in parts)
    assert [held.tolist() for _, held in make_folds(of, 5, seed=0)] == [held.tolist() for _, held in parts]
    assert [held.tolist() for _, held in make_folds(of, 5, seed=1)] != [held.tolist() for _, held in parts]


LETTERS = ("a", "b")


@pytest.mark.parametrize(
    ("of", "share", "groups", "said"),
    [
        ([0, 0, 1], 0.5, None, "dataset.eval_split=0.5: one for training and one to hold out, so at least 2 records of "
                               "each label are needed; 'b' has 1; leave out the records of rarer labels, or add"),
        ([0, 0, 2], 0.5, None, "number 2 has 1"),
        ([0], 0.5, None, "dataset.eval_split=0.5: at least two records are needed, got 1"),
        ([], 0.5, None, "at least two records are needed, got 0"),
        ([0] * 9 + [1] * 9, 0.05, None, "dataset.eval_split=0.05 holds out 1 of 18 records and leaves 17: 1 "
                                        "cannot have one record for each of 2 labels"),
        ([0] * 9 + [1] * 9, 0.99, None, "18 of 18 records and leaves 0: 0 cannot have one record for each of 2"),
        ([0, 0], 0.0, None, "dataset.eval_split=0.0: a share between 0 and 1 is needed"),
        ([0, 0], 1.0, None, "dataset.eval_split=1.0: a share between 0 and 1 is needed"),
        ([0, 0], 0.5, [3, 3], "dataset.eval_split=0.5: groups are not split, and holding out 1 of 1 leaves none"),
        ([0, 0], 0.9, [3, 4], "dataset.eval_split=0.9: groups are not split, and holding out 2 of 2 leaves none"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_says_why(of: list[int], share: float, groups: list[int] | None, said: str):
    with pytest.raises(ValueError, match=r"^dataset\.eval_split=") as caught:
        split(np.array(of), share, 0, None if groups is None else np.array(groups), LETTERS)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("of", "number", "groups", "said"),
    [
        (
            [0] * 9 + [1] * 4,
            5,
            None,
            "5 folds: one for each, so at least 5 records of each label are needed; 'b' has 4",
        ),
        ([0] * 3, 5, None, "5 folds: at least as many records are needed, got 3"),
        ([0] * 3, 1, None, "at least 2 folds are needed, got 1"),
        ([0] * 6, 3, [1, 1, 1, 2, 2, 2], "3 folds: at least as many groups are needed, got 2; groups are not split"),
    ],
)
def test_what_cannot_be_folded_says_why(of: list[int], number: int, groups: list[int] | None, said: str):
    with pytest.raises(ValueError, match="folds") as caught:
        make_folds(np.array(of), number, 0, None if groups is None else np.array(groups), LETTERS)
    assert said in str(caught.value)
