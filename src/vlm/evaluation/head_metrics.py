"""How good the predictions of a head are: metrics with intervals, beside those of a constant prediction.

May import `vlm.evaluation.calibration` and `vlm.evaluation.bootstrap`. To add a metric, add it to the function of its
task; to add a task, add its function to `MEASURES`.

Every such function takes targets, what was decided, and what ranks the samples (probabilities or numbers; None for a
constant prediction, which has no metrics of ranks), and gives NaN where a metric is undefined.

Shapes: N samples, C labels, K numbers that a head gives for a sample.
"""

import numpy as np
import torch
import torchmetrics.functional.classification as classification
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import (
    accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
    root_mean_squared_error,
)

from vlm.evaluation.bootstrap import Score, bootstrap
from vlm.evaluation.calibration import Calibration, checked, checked_targets
from vlm.models.head_tasks import CLASSIFYING

NUM_BINS = 15
"""Equally wide bins of the expected calibration error (Guo et al. 2017, arXiv:1706.04599)."""


def scores(
    task: str,
    outputs: np.ndarray,
    targets: np.ndarray,
    calibration: Calibration,
    *,
    groups: np.ndarray | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """The metrics of a task.

    Macro averages are over the labels that some samples have and some have not. `ece` is the expected calibration
    error: of the positive label, of the likeliest one (`multiclass`), of all labels together (`multilabel`).
    `spearman` of `ordinal` ranks by the expected label.

    Samples are resampled one by one, of `pairwise` as whole groups, unless there is only one. Resamples for which a
    metric is undefined do not count for it.

    Args:
        task: one of `TASKS`.
        outputs: `(N, K)`, the raw numbers of its head.
        targets: `(N,)`, or `(N, C)` for `multilabel`, see `calibration.checked`.
        calibration: from validation data.
        groups: `(N,)`, for `pairwise` alone: only samples of the same group are compared.
        num_resamples: of the bootstrap; 0 gives no intervals.
        seed: of the resamples.

    Raises:
        ValueError: data that `calibration.checked` refuses, or groups that are missing, too many or not wanted.
    """
    outputs, targets = checked(task, outputs, targets)
    if task == "pairwise":
        return _pairwise(outputs[:, 0], targets, checked_groups(groups, len(targets)), num_resamples, seed)
    if groups is not None:
        raise ValueError(f"groups: {task} has none, only pairwise compares within groups")
    decided, ranked = calibration.decide(task, outputs), outputs[:, 0]
    if task in CLASSIFYING:
        ranked = calibration.probabilities(task, outputs)
    return _with_intervals(task, targets, decided, ranked, num_resamples, seed)


def baseline(
    task: str,
    train_targets: np.ndarray,
    targets: np.ndarray,
    *,
    num_labels: int,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """The metrics of always giving what is commonest in training, on the resamples of `scores`.

    That is the commonest label, of several the first (`multilabel`: for each label whether most samples have it), the
    mean (`regression`), the median (`ordinal`, of two the lower), or the same score for all (`pairwise`). Without
    metrics of ranks and probabilities.

    Args:
        task: one of `TASKS`.
        train_targets: `(M,)` or `(M, C)`, of the training data.
        targets: `(N,)` or `(N, C)`, of the data that is evaluated.
        num_labels: C; not looked at where a task has no labels.
        num_resamples: of the bootstrap.
        seed: of the resamples.

    Raises:
        ValueError: data that `calibration.checked` refuses.
    """
    train_targets = checked_targets(task, train_targets, num_labels)
    targets = checked_targets(task, targets, num_labels)
    if task == "pairwise":
        return {"pair_accuracy": Score(0.5, *((0.5, 0.5) if num_resamples else (None, None)))}
    if task == "regression":
        constant = train_targets.mean()
    elif task == "ordinal":
        constant = np.quantile(train_targets, 0.5, method="inverted_cdf")
    elif task == "multilabel":
        constant = (train_targets.mean(axis=0) > 0.5).astype(np.int64)
    else:
        constant = np.bincount(train_targets).argmax()
    decided = np.broadcast_to(constant, targets.shape).copy()
    return _with_intervals(task, targets, decided, None, num_resamples, seed)


def _with_intervals(
    task: str, targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None, num_resamples: int, seed: int
) -> dict[str, Score]:
    """Metrics of samples that count one by one."""

    def measured(rows: np.ndarray) -> dict[str, float]:
        return MEASURES[task](targets[rows], decided[rows], None if ranked is None else ranked[rows])

    return bootstrap(measured, len(targets), num_resamples, seed)


def _binary(targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None) -> dict[str, float]:
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets,
        decided,
        average="binary",
        zero_division=np.nan,  # pyright: ignore[reportArgumentType]: NaN is allowed
    )
    found = {"accuracy": accuracy_score(targets, decided), "f1": f1, "precision": precision, "recall": recall}
    if ranked is None:
        return found
    preds, target = torch.tensor(ranked[:, 1]), torch.from_numpy(targets)
    ece = classification.binary_calibration_error(preds, target, n_bins=NUM_BINS, validate_args=False)
    return {**_ranking(targets[:, None], ranked[:, 1:]), **found, "ece": ece.item()}


def _multiclass(targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None) -> dict[str, float]:
    present = np.unique(targets)
    f1 = np.nan
    if len(present) > 1:
        f1 = f1_score(targets, decided, labels=present, average="macro")
    found = {"accuracy": accuracy_score(targets, decided), "f1": f1}
    if ranked is None:
        return found
    num_labels = ranked.shape[1]
    ece = classification.multiclass_calibration_error(
        torch.from_numpy(ranked), torch.from_numpy(targets), num_labels, n_bins=NUM_BINS, validate_args=False
    )
    return {**found, **_ranking(np.eye(num_labels, dtype=np.int64)[targets], ranked), "ece": ece.item()}


def _multilabel(targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None) -> dict[str, float]:
    both = _both(targets)
    preds, target = torch.from_numpy(decided), torch.from_numpy(targets)
    f1 = classification.multilabel_f1_score(preds, target, targets.shape[1], average="none", validate_args=False)
    found = {
        "f1": f1.reshape(-1).numpy()[both].mean() if both.any() else np.nan,  # of one label it has no dimension
        "accuracy": accuracy_score(targets.ravel(), decided.ravel()),
        "exact_match": accuracy_score(targets, decided),
    }
    if ranked is None:
        return found
    preds = torch.from_numpy(ranked).flatten()
    ece = classification.binary_calibration_error(preds, target.flatten(), n_bins=NUM_BINS, validate_args=False)
    return {**_ranking(targets, ranked), **found, "ece": ece.item()}


def _both(targets: np.ndarray) -> np.ndarray:
    """Which labels some samples have and some have not: `(N, C) -> (C,)`."""
    return targets.min(axis=0) < targets.max(axis=0)


def _ranking(targets: np.ndarray, chances: np.ndarray) -> dict[str, float]:
    """Macro areas under the ROC and the precision-recall curve: `(N, C), (N, C)`.

    By torchmetrics, whose areas are those of scikit-learn in a fifth of the time.
    """
    found: dict[str, list[float]] = {"auroc": [], "average_precision": []}
    for label in np.flatnonzero(_both(targets)):
        preds, target = torch.tensor(chances[:, label]), torch.tensor(targets[:, label])
        found["auroc"].append(classification.binary_auroc(preds, target, validate_args=False).item())
        area = classification.binary_average_precision(preds, target, validate_args=False)
        found["average_precision"].append(area.item())
    return {name: float(np.mean(areas)) if areas else np.nan for name, areas in found.items()}


def _regression(targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None) -> dict[str, float]:
    found = {
        "mae": mean_absolute_error(targets, decided),
        "rmse": root_mean_squared_error(targets, decided),
        "r2": r2_score(targets, decided) if np.ptp(targets) else np.nan,
    }
    return found if ranked is None else {**found, "spearman": _spearman(targets, ranked)}


def _ordinal(targets: np.ndarray, decided: np.ndarray, ranked: np.ndarray | None) -> dict[str, float]:
    labels = np.arange(max(targets.max(), decided.max()) + 1)  # their numbers are what steps are counted in
    agreed = targets.min() == targets.max() == decided.min() == decided.max()  # nothing to agree on beyond chance
    found = {
        "accuracy": accuracy_score(targets, decided),
        "mae": mean_absolute_error(targets, decided),
        "kappa": np.nan if agreed else cohen_kappa_score(targets, decided, labels=labels, weights="quadratic"),
    }
    if ranked is None:
        return found
    return {**found, "spearman": _spearman(targets, ranked @ np.arange(ranked.shape[1]))}


MEASURES = {
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "regression": _regression,
    "ordinal": _ordinal,
}
"""Task -> its metrics on some samples; `pairwise`, whose samples do not count one by one, has `_pairwise`."""


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant."""
    if not np.ptp(first) or not np.ptp(second):
        return np.nan
    return spearmanr(first, second).statistic  # pyright: ignore[reportAttributeAccessIssue]: typed as a bare tuple


def checked_groups(groups: np.ndarray | None, num_samples: int) -> np.ndarray:
    """Groups of `pairwise`, `(N,)`; refused where they are missing or of another shape."""
    if groups is None or np.shape(groups) != (num_samples,):
        shape = None if groups is None else np.shape(groups)
        raise ValueError(f"groups of pairwise: got {shape}, expected the group of each of {num_samples} samples")
    return np.asarray(groups)


def _pairwise(
    given: np.ndarray, relevance: np.ndarray, groups: np.ndarray, num_resamples: int, seed: int
) -> dict[str, Score]:
    """`pair_accuracy`, of all pairs together, and `spearman`, the mean of the groups where it is defined.

    Each group is measured once, as what is in it is not resampled, unless it is the only one.
    """
    rows = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    if len(rows) == 1:
        return bootstrap(
            lambda some: _of_groups(_group(given[some], relevance[some])[None]), len(given), num_resamples, seed
        )
    table = np.array([_group(given[some], relevance[some]) for some in rows])
    return bootstrap(lambda some: _of_groups(table[some]), len(rows), num_resamples, seed)


def _of_groups(table: np.ndarray) -> dict[str, float]:
    """The metrics of groups from those of each: `(groups, 3)`."""
    right, pairs, spearman = table.T
    defined = spearman[~np.isnan(spearman)]
    return {
        "pair_accuracy": right.sum() / pairs.sum() if pairs.any() else np.nan,
        "spearman": defined.mean() if len(defined) else np.nan,
    }


def _group(given: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Pairs of one group that are ordered rightly, pairs that have an order, and rank correlation: `(3,)`.

    Right pairs less wrong ones are Kendall's tau-b, less its correction for ties (Kendall 1945): with a tie of scores
    as half a right pair, no pair need be looked at.
    """
    pairs, distinct = _pairs_that_differ(relevance), _pairs_that_differ(given)
    if not pairs or not distinct:
        return np.array([pairs / 2, pairs, np.nan])
    excess = kendalltau(relevance, given)[0] * np.sqrt(pairs * distinct)
    return np.array([(pairs + np.rint(excess)) / 2, pairs, _spearman(relevance, given)])


def _pairs_that_differ(values: np.ndarray) -> float:
    """How many pairs of samples do not have the same value: `(N,)`."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return (len(values) ** 2 - (counts**2).sum()) / 2


def confusion(
    task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration, num_labels: int
) -> np.ndarray | None:
    """How many samples of each label were decided to be which.

    Args:
        task: one of `TASKS`.
        outputs: `(N, K)`, the raw numbers of its head.
        targets: `(N,)` or `(N, C)`.
        calibration: from validation data.
        num_labels: C.

    Returns:
        `(C, C)`, a row for each true label; of `multilabel` `(C, 2, 2)`, those of each label; None for tasks without
        labels.
    """
    outputs, targets = checked(task, outputs, targets)
    if task not in CLASSIFYING:
        return None
    decided = calibration.decide(task, outputs)
    if task == "multilabel":  # label by label: multilabel_confusion_matrix takes a single column for two classes
        pairs = zip(targets.T, decided.T, strict=True)
        return np.stack([confusion_matrix(truth, given, labels=[0, 1]) for truth, given in pairs])
    return confusion_matrix(targets, decided, labels=np.arange(num_labels))
