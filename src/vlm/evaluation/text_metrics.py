"""Metrics of answers against references. To add one, write a function and add it to `METRICS` and its name to
`vlm.config.choices.ANSWER_METRICS`; one of the user's own is named `package.module:function` instead.

A metric takes the answers and, for each answer, at least one reference. It returns a value for each answer,
`(answers,)`, which are averaged; or a single number for all answers together. It imports the libraries of the extra
`eval` that it needs.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import zip_longest
from types import ModuleType

import numpy as np

from vlm.config.choices import HALLUCINATION_METRICS, LOSS_METRICS
from vlm.config.named import import_named, is_custom_name
from vlm.config.suggestions import suggest_value
from vlm.evaluation.bootstrap import Score, make_score, mean_score
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, compute_object_metrics

References = Sequence[Sequence[str]]
Metric = Callable[[Sequence[str], References], np.ndarray | float]

ANLS_THRESHOLD = 0.5
"""Normalised distance from which on an answer scores 0 (Biten et al. 2019, arXiv:1907.00490)."""


def exact_match(answers: Sequence[str], references: References) -> np.ndarray:
    """Return 1 for each answer that equals one of its references, both as `normalize_answer` returns them, else 0."""
    pairs = zip(answers, references, strict=True)
    return np.array([normalize_answer(answer) in map(normalize_answer, known) for answer, known in pairs], np.float64)


def vqa_accuracy(answers: Sequence[str], references: References) -> np.ndarray:
    """Return the VQA accuracy of each answer (Antol et al. 2015, arXiv:1505.00468).

    It is the mean, over each reference left out, of `min(number of the others that equal the answer / 3, 1)`; with
    fewer than three others, all of them must agree. A single reference gives 1 or 0. Answers and references are
    compared as `normalize_vqa_answer` returns them.
    """

    def accuracy(answer: str, known: Sequence[str]) -> float:
        """Return the accuracy of one answer, from 0 to 1."""
        matches = [normalize_vqa_answer(reference) == normalize_vqa_answer(answer) for reference in known]
        if len(matches) == 1:
            return float(matches[0])
        required = min(3, len(matches) - 1)
        return float(np.mean([min((sum(matches) - match) / required, 1) for match in matches]))

    return _score_each(accuracy, answers, references)


def anls(answers: Sequence[str], references: References) -> np.ndarray:
    """Return normalised Levenshtein similarities (Biten et al. 2019, arXiv:1907.00490): `(answers,)`, from 0 to 1.

    `1 - d` where the distance d to the nearest reference, ignoring case, is below `ANLS_THRESHOLD`, else 0.
    """
    distance = import_extra("rapidfuzz.distance").Levenshtein.normalized_distance

    def similarity(answer: str, known: Sequence[str]) -> float:
        """Return the similarity of one answer to the nearest reference, from 0 to 1."""
        nearest = min(distance(answer.strip().lower(), reference.strip().lower()) for reference in known)
        return 1 - nearest if nearest < ANLS_THRESHOLD else 0.0

    return _score_each(similarity, answers, references)


def cider(answers: Sequence[str], references: References) -> np.ndarray:
    """Return CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) by pycocoevalcap; 10 for a copy of a single reference.

    Texts are split by `tokenize`. COCO's own script runs the Penn Treebank tokeniser (in Java), which splits `it's`
    into `it` and `'s`, keeps symbols such as `$`, and leaves hyphens in words: scores of such texts differ a little.
    The weight of a word depends on how few references contain it, so scores of few records mean little (a single
    record always has 0), and their intervals do not include that uncertainty.
    """
    score = import_extra("pycocoevalcap.cider.cider").Cider().compute_score
    if not answers:
        return np.zeros(0)
    _, scores = score(
        {number: [tokenize(reference) for reference in known] for number, known in enumerate(references)},
        {number: [tokenize(answer)] for number, answer in enumerate(answers)},
    )
    return np.asarray(scores)


def bleu(answers: Sequence[str], references: References) -> float:
    """Return BLEU-4 (Papineni et al. 2002) of all answers together, 0 to 100, by sacrebleu's tokenisation (`13a`).

    Where no answer has four words, it is of the longest n-grams that there are: right answers of one word have 100, and
    not the 0 that four-grams would give them. NaN without answers.
    """
    library = import_extra("sacrebleu")
    columns = [list(column) for column in zip_longest(*references)]
    return library.corpus_bleu(list(answers), columns, use_effective_order=True).score if answers else float("nan")


def rouge(answers: Sequence[str], references: References) -> np.ndarray:
    """Return ROUGE-L (Lin 2004), 0 to 1: F-measure of the longest common subsequence of words with the best reference.

    Computed by rouge-score without stemming; words are runs of the letters a to z and digits, so it is for English.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return _score_each(lambda answer, known: scorer.score_multi(known, answer)["rougeL"].fmeasure, answers, references)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (exact_match, vqa_accuracy, anls, cider, bleu, rouge)
}

UNBOUNDED_METRICS = frozenset({"cider"})
"""Metrics whose value of an answer may be greater than 1."""

ALL_METRICS = (*METRICS, *OBJECT_METRICS, *HALLUCINATION_METRICS, *LOSS_METRICS)
"""The names of all metrics; those of places are in `object_metrics.py`, those of objects that are not there in
`hallucination.py`, those of losses in `loss_metrics.py`."""

METRIC_MODULES = {
    "anls": "rapidfuzz.distance",
    "cider": "pycocoevalcap.cider.cider",
    "bleu": "sacrebleu",
    "rouge": "rouge_score.rouge_scorer",
}
"""Metric -> the module of the extra `eval` that it needs."""


def compute_answer_metrics(
    names: Sequence[str],
    answers: Sequence[str],
    references: References,
    objects: Sequence[ObjectAnswer],
    *,
    intervals: bool = True,
) -> dict[str, Score]:
    """Return metrics of texts and of objects by name, in the order of the names; `objects` are those of each answer.

    Raises:
        ValueError: as `compute_text_metrics` and `compute_object_metrics`.
    """
    of_objects = [name for name in names if name in OBJECT_METRICS]
    of_texts = [name for name in names if name not in OBJECT_METRICS]
    scores = compute_text_metrics(of_texts, answers, references, intervals=intervals)
    if of_objects:
        scores |= compute_object_metrics(of_objects, objects, intervals=intervals)
    return {label: scores[label] for label in (name.rpartition(":")[2] for name in names)}


def compute_text_metrics(
    names: Sequence[str], answers: Sequence[str], references: References, *, intervals: bool = True
) -> dict[str, Score]:
    """Return metrics by name; those that are means over answers have 95% intervals, unless `intervals` is False.

    Raises:
        ValueError: a metric is unknown, needs a library that is missing, or returns values of another shape.
    """
    scores = {}
    for name in names:
        values = np.asarray(get_metric(name)(answers, references), np.float64)
        if values.shape not in ((), (len(answers),)):
            hint = "a number for each is needed, or a single one"
            raise ValueError(f"{name}: it returned values of shape {values.shape} for {len(answers)} answers; {hint}")
        if values.ndim:
            score = mean_score(values, 1000 if intervals else 0, is_bounded=name not in UNBOUNDED_METRICS)
        else:
            score = make_score(values.item())
        scores[name.rpartition(":")[2]] = score
    return scores


def get_metric(name: str, key: str = "metric") -> Metric:
    """Return the metric of the table, or the user's own, `package.module:function`.

    Raises:
        ValueError: `key` names a function that does not exist.
    """
    return METRICS[name] if name in METRICS else import_named(name, key)  # pyright: ignore[reportReturnType] - theirs


def check_metrics(names: Sequence[str], allowed: Sequence[str], key: str) -> None:
    """Refuse names of metrics that are unknown, or whose library is missing; `key` precedes a name in messages.

    Raises:
        ValueError: with the name, and what is allowed or what to install.
    """
    labels = [name.rpartition(":")[2] for name in names]
    for name, label in zip(names, labels, strict=True):
        if is_custom_name(name):
            get_metric(name, key.rstrip("= "))
        elif name not in allowed:
            hint = suggest_value(name, allowed, "")
            listing = ", ".join(allowed)
            raise ValueError(f"{key}{name}: allowed are {listing}, or package.module:function for your own.{hint}")
        if labels.count(label) > 1:
            raise ValueError(f"{key}{name}: two metrics have the name {label}")
        if name in METRIC_MODULES:
            import_extra(METRIC_MODULES[name])


def import_extra(module: str) -> ModuleType:
    """Import a module of the extra `eval`.

    Raises:
        ValueError: the module is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{module.partition('.')[0]} is not installed: pip install 'small-vlm[eval]'") from error


def _score_each(
    metric: Callable[[str, Sequence[str]], float], answers: Sequence[str], references: References
) -> np.ndarray:
    return np.array([metric(*pair) for pair in zip(answers, references, strict=True)], dtype=np.float64)


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without surrounding white space or a full stop at its end."""
    return text.strip().removesuffix(".").rstrip().casefold()


def tokenize(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces; a word may contain apostrophes."""
    return " ".join(re.findall(r"\w+(?:['’]\w+)*", text.lower()))


NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBER_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED_WORDS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
    "something'd've something'll that'd that'd've that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've "
    "y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
"""Contractions that people write without apostrophes; those that would be other words (`we'll`) are left out."""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED_WORDS.split()}


def normalize_vqa_answer(text: str) -> str:
    """Return an answer as VQA's evaluation compares it: lower case, numbers as digits, no articles, no punctuation.

    Punctuation beside a space, or in a text with a comma between digits, is removed; elsewhere a space replaces it.
    Full stops are removed unless a digit follows. VQA's own script changes neither answers where all references agree
    nor references beyond punctuation; here both sides are always normalised alike.
    """
    original = text = re.sub(r"\s+", " ", text).strip()
    grouped = re.search(r"\d,\d", original) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if grouped or beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    words = (NUMBER_DIGITS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in ARTICLES)
