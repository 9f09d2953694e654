"""Metrics of answers against references. To add one, write a function and add it to `METRICS` and its name to
`vlm.config.choices.EVAL_METRICS`; one of the user's own is named `package.module:function` instead.

A metric takes the answers and, for each, its references (at least one). It gives a value for each answer, `(answers,)`,
whose mean counts; or a single number, where it is one of all answers together.

Imports `vlm.evaluation.bootstrap`; the libraries of the extra `eval` when a metric needs one.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from vlm.config.named import import_named, is_custom_name
from vlm.evaluation.bootstrap import Score, mean_score

References = Sequence[Sequence[str]]
Metric = Callable[[Sequence[str], References], np.ndarray | float]

ANLS_THRESHOLD = 0.5
"""A distance from which on an answer counts nothing (Biten et al. 2019, arXiv:1907.00490)."""


def exact_match(answers: Sequence[str], references: References) -> np.ndarray:
    """1 where an answer is one of its references, but for case, white space around it and a full stop at its end."""
    return _score_each(
        lambda answer, known: normalize_answer(answer) in {normalize_answer(one) for one in known}, answers, references
    )


def vqa_accuracy(answers: Sequence[str], references: References) -> np.ndarray:
    """The accuracy of VQA (Antol et al. 2015, arXiv:1505.00468): what three people said counts as right.

    For each person left out, `min(people among the others who said it / 3, 1)`; the mean of these. Among fewer than
    three others all must agree; a single reference counts 1 or 0. Answers and references are compared as
    `normalize_vqa_answer`.
    """

    def accuracy(answer: str, known: Sequence[str]) -> float:
        same = [normalize_vqa_answer(one) == normalize_vqa_answer(answer) for one in known]
        if len(same) == 1:
            return float(same[0])
        enough = min(3, len(same) - 1)
        return float(np.mean([min((sum(same) - one) / enough, 1) for one in same]))

    return _score_each(accuracy, answers, references)


def anls(answers: Sequence[str], references: References) -> np.ndarray:
    """Average normalised Levenshtein similarity to the nearest reference, without regard to case (arXiv:1907.00490)."""
    distance = import_extra("rapidfuzz.distance").Levenshtein.normalized_distance

    def similarity(answer: str, known: Sequence[str]) -> float:
        nearest = min(distance(answer.strip().lower(), one.strip().lower()) for one in known)
        return 1 - nearest if nearest < ANLS_THRESHOLD else 0.0

    return _score_each(similarity, answers, references)


def cider(answers: Sequence[str], references: References) -> np.ndarray:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) by pycocoevalcap; 10 for a copy of a single reference.

    Words are runs of letters and digits, in lower case, with apostrophes inside them. COCO's own script runs the Penn
    Treebank tokeniser (in Java), which splits `it's` into `it` and `'s`, keeps symbols such as `$`, and leaves hyphens
    in words: where texts have such, figures differ a little. Words count by how few of the references have them, so
    scores of few records say little (of one, always 0), and their interval takes that as given.
    """
    score = import_extra("pycocoevalcap.cider.cider").Cider().compute_score
    if not answers:
        return np.zeros(0)
    _, found = score(
        {number: [tokenize(one) for one in known] for number, known in enumerate(references)},
        {number: [tokenize(one)] for number, one in enumerate(answers)},
    )
    return np.asarray(found)


def bleu(answers: Sequence[str], references: References) -> float:
    """BLEU-4 of all answers together, 0 to 100, by sacrebleu with its own tokenisation (`13a`)."""
    library = import_extra("sacrebleu")
    most = max(map(len, references), default=0)
    columns = [[known[place] if place < len(known) else None for known in references] for place in range(most)]
    return library.corpus_bleu(list(answers), columns).score if answers else float("nan")


def rouge(answers: Sequence[str], references: References) -> np.ndarray:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words with the best reference.

    By rouge-score, without stemming; its words are runs of the letters a to z and digits, so it is for English.
    """
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return _score_each(lambda answer, known: scorer.score_multi(known, answer)["rougeL"].fmeasure, answers, references)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "cider": cider,
    "bleu": bleu,
    "rouge": rouge,
}

LOSS = "loss"
"""What stands for the losses where metrics are named; they are in `metrics.py`."""
ALL_METRICS = (*METRICS, LOSS)

METRIC_MODULES = {
    "anls": "rapidfuzz.distance",
    "cider": "pycocoevalcap.cider.cider",
    "bleu": "sacrebleu",
    "rouge": "rouge_score.rouge_scorer",
}
"""Metric -> the module of the extra `eval` that it needs."""


def compute_text_metrics(
    names: Sequence[str], answers: Sequence[str], references: References, *, intervals: bool = True
) -> dict[str, Score]:
    """Metrics by name, with 95% intervals where they are wanted and metrics are means of what single answers get."""
    scores = {}
    for name in names:
        values = np.asarray(get_metric(name)(answers, references), np.float64)
        if values.shape not in ((), (len(answers),)):
            raise ValueError(f"{name}: it gave values of shape {values.shape} for {len(answers)} answers; a number for "
                             "each is needed, or a single one")  # fmt: skip
        scores[name.rpartition(":")[2]] = (
            mean_score(values, num_resamples=1000 if intervals else 0)
            if values.ndim
            else Score(None if np.isnan(values) else values.item(), None, None)
        )
    return scores


def get_metric(name: str, key: str = "metric") -> Metric:
    """Return the metric of the table, or the user's own, `package.module:function`.

    Raises:
        ValueError: `key` names a function that does not exist.
    """
    return METRICS[name] if name in METRICS else import_named(name, key)  # pyright: ignore[reportReturnType] - theirs


def check_metrics(names: Sequence[str], allowed: Sequence[str], key: str) -> None:
    """Refuse names of metrics that are unknown, or whose library is missing.

    Args:
        names: what was asked for.
        allowed: what there is.
        key: what stood before a name where the user wrote it: `--metrics `.

    Raises:
        ValueError: with the name, and what is allowed or what to install.
    """
    labels = [name.rpartition(":")[2] for name in names]
    for name, label in zip(names, labels, strict=True):
        if is_custom_name(name):
            get_metric(name, key.rstrip("= "))
        elif name not in allowed:
            raise ValueError(f"{key}{name}: allowed are {', '.join(allowed)}, or package.module:function for your own")
        if labels.count(label) > 1:
            raise ValueError(f"{key}{name}: two metrics are called {label}")
        if name in METRIC_MODULES:
            import_extra(METRIC_MODULES[name])


def import_extra(module: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{module.partition('.')[0]} is missing: pip install 'small-vlm[eval]'") from error


def _score_each(
    value: Callable[[str, Sequence[str]], float], answers: Sequence[str], references: References
) -> np.ndarray:
    return np.array([value(*one) for one in zip(answers, references, strict=True)], dtype=np.float64)


def normalize_answer(text: str) -> str:
    """A text in lower case, without white space around it or a full stop at its end."""
    return text.strip().removesuffix(".").rstrip().casefold()


def tokenize(text: str) -> str:
    """The words of a text in lower case, a space between each."""
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
"""Contractions that people write without apostrophes; those that are other words then (`we'll`) are left out."""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED_WORDS.split()}


def normalize_vqa_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, numbers as digits, no articles, no punctuation.

    Punctuation beside a space, or in a text with a comma between digits, goes; elsewhere a space takes its place. Of
    full stops those before a digit stay. Its own script leaves answers as they are where all people said the same,
    and does not change what people said beyond punctuation; here both sides are always treated alike.
    """
    given = text = re.sub(r"\s+", " ", text).strip()
    grouped = re.search(r"\d,\d", given) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if grouped or beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    found = (NUMBER_DIGITS.get(word, word) for word in text.split())
    kept = (word for word in found if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in kept)
