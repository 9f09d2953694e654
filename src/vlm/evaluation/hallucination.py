"""Metrics of objects that a model sees or names although they are not there.

To add one, write a function that returns a row of numbers for each answer and what is made of their sums, and add it to
`HALLUCINATION_METRICS` and its name to `vlm.config.choices.HALLUCINATION_METRICS`.

Each is computed of the answers to the images, and of those to blank images, with `blank_` in front: what a model says
without seeing anything. Intervals resample images, since the questions about one are no independent evidence; a share
of answers has Wilson's interval where each image has one, and at 0 and 1.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from vlm.data.tools.chair import SYNONYM_SEPARATOR
from vlm.evaluation.bootstrap import Score, bootstrap
from vlm.evaluation.text_metrics import References, normalize_answer

NUM_RESAMPLES = 1000
BLANK_PREFIX = "blank_"
SHARES = ("pope_accuracy", "pope_yes", "pope_unclear", "chair_s")
"""Metrics that are a share of all answers."""
NEGATIONS = {"no", "not", "n't"}

Counts = np.ndarray
"""`(answers, columns)`: what is counted of each answer."""
Prepared = tuple[Counts, Callable[[np.ndarray], dict[str, float]]]
"""Counts, and the function that makes metrics of their sums, `(columns,)`."""


def prepare_pope(answers: Sequence[str], references: References) -> Prepared:
    """Return accuracy, precision, recall and F1 of `yes`, and its share (Li et al. 2023, arXiv:2305.10355).

    An answer whose first sentence has `no` or `not` is no, any other is yes, as in the authors' script. `pope_unclear`
    is the share of answers that have neither these nor `yes`.

    Raises:
        ValueError: a reference is neither yes nor no.
    """
    true = [normalize_answer(known[0]) for known in references]
    for text in true:
        if text not in ("yes", "no"):
            raise ValueError(f"pope: a reference is {text!r:.40}; yes or no is needed, see vlm data pope")
    rows = []
    for answer, right in zip(answers, true, strict=True):
        words = set(re.findall(r"n't\b|\w+(?=n't)|\w+", answer.split(".")[0].lower().replace("’", "'")))
        says_yes, is_yes = not words & NEGATIONS, right == "yes"
        rows.append((1, says_yes == is_yes, says_yes, is_yes, says_yes and is_yes, says_yes and "yes" not in words))
    return np.array(rows, np.float64).reshape(-1, 6), _pope_of_sums


def _pope_of_sums(sums: np.ndarray) -> dict[str, float]:
    """Return the metrics of sums: all, right, answered yes, truly yes, both, and unclear answers."""
    number, right, said, true, both, unclear = sums.tolist()
    return {
        "pope_accuracy": _ratio(right, number),
        "pope_precision": _ratio(both, said),
        "pope_recall": _ratio(both, true),
        "pope_f1": _ratio(2 * both, said + true),
        "pope_yes": _ratio(said, number),
        "pope_unclear": _ratio(unclear, number),
    }


def prepare_chair(answers: Sequence[str], references: References) -> Prepared:
    """Return how many objects of captions are not there (Rohrbach et al. 2018, arXiv:1809.02156).

    `chair_i` is the share of all objects named that are not in their image, `chair_s` the share of captions that name
    such an object, `chair_recall` the share of the objects there that are named, and `chair_objects` the number named
    in a caption: short captions have few wrong ones. An object counts once a caption. Looked for are all objects of
    `references`, and their synonyms behind `|`.
    """
    present = [{_canonical(text) for text in known} for known in references]
    find = make_object_finder([text for known in references for text in known])
    rows = []
    for answer, there in zip(answers, present, strict=True):
        named = find(answer)
        wrong = len(named - there)
        rows.append((1, len(named), wrong, wrong > 0, len(there), len(named & there)))
    return np.array(rows, np.float64).reshape(-1, 6), _chair_of_sums


def _chair_of_sums(sums: np.ndarray) -> dict[str, float]:
    """Return the metrics of sums: captions, objects named, wrong ones, captions with one, objects there, and found."""
    number, named, wrong, with_wrong, there, found = sums.tolist()
    return {
        "chair_i": _ratio(wrong, named),
        "chair_s": _ratio(with_wrong, number),
        "chair_recall": _ratio(found, there),
        "chair_objects": _ratio(named, number),
    }


def make_object_finder(objects: Sequence[str]) -> Callable[[str], set[str]]:
    """Return what finds objects in a text: each is its name and synonyms, separated by `|`, in singular or plural.

    Longer names win: in `hot dog` there is no dog.
    """
    known: dict[str, str] = {}
    for text in dict.fromkeys(objects):
        for name in text.lower().split(SYNONYM_SEPARATOR):
            plurals = [f"{name}s", f"{name}es", *([f"{name[:-1]}ies"] if name.endswith("y") else [])]
            for form in (name, *plurals):
                known.setdefault(form, _canonical(text))
    forms = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{forms})(?!\w)")
    return lambda text: {known[form] for form in pattern.findall(" ".join(text.lower().split()))}


def _canonical(text: str) -> str:
    """Return the name of an object that is written with its synonyms."""
    return text.lower().split(SYNONYM_SEPARATOR)[0]


def _ratio(part: float, whole: float) -> float:
    """Return a share; NaN of nothing."""
    return part / whole if whole else float("nan")


HALLUCINATION_METRICS: dict[str, Callable[[Sequence[str], References], Prepared]] = {
    "pope": prepare_pope,
    "chair": prepare_chair,
}
"""Name of a metric -> what prepares it."""


def compute_hallucination_metrics(
    names: Sequence[str],
    answers: Sequence[str],
    blank_answers: Sequence[str],
    references: References,
    images: Sequence[str],
) -> dict[str, Score]:
    """Return metrics by name with 95% intervals, and beside each that of blank images.

    Args:
        names: names of `HALLUCINATION_METRICS`.
        answers: the answers.
        blank_answers: those to blank images.
        references: what each is compared with.
        images: what each answer is about; answers about the same are drawn together.

    Raises:
        ValueError: references are not what a metric needs.
    """
    _, units = np.unique(np.asarray(images, dtype=object).astype(str), return_inverse=True)
    scores: dict[str, Score] = {}
    for name in names:
        own = _score(name, answers, references, units)
        blank = _score(name, blank_answers, references, units)
        for label, score in own.items():
            scores |= {label: score, f"{BLANK_PREFIX}{label}": blank[label]}
    return scores


def _score(name: str, answers: Sequence[str], references: References, units: np.ndarray) -> dict[str, Score]:
    counts, make_metrics = HALLUCINATION_METRICS[name](answers, references)
    sums = np.zeros((int(units.max()) + 1, counts.shape[1]))
    np.add.at(sums, units, counts)
    has_one_each = len(sums) == len(counts)
    return bootstrap(
        lambda rows: make_metrics(sums[rows].sum(axis=0)),
        len(sums),
        NUM_RESAMPLES,
        seed=0,
        shares=SHARES if has_one_each else (),
        clustered_shares=SHARES,
    )
