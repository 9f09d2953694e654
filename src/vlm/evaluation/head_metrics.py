"""Metrics of a head's predictions with intervals, and those of a constant prediction.

To add a metric, add it to the function of its task; to add a task, add its function to `TASK_METRICS`.

Shapes: N samples, C labels, K outputs of a head for a sample.
"""

from collections.abc import Callable

import numpy as np
import torch
import torchmetrics.functional.classification as classification
from scipy.stats import kendalltau, spearmanr
from sklearn import config_context
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
from vlm.evaluation.calibration import Calibration, validate_outputs, validate_targets
from vlm.models.head_tasks import CLASSIFICATION_TASKS

NUM_BINS = 15
"""Equally wide bins of the expected calibration error (Guo et al. 2017, arXiv:1706.04599)."""

SHARES = {
    "binary": ("accuracy",),
    "multiclass": ("accuracy",),
    "ordinal": ("accuracy",),
    "multilabel": ("exact_match",),
}
"""Task -> its metrics that are a share of samples, see `bootstrap`."""
CLUSTERED_SHARES = {"multilabel": ("accuracy",), "pairwise": ("pair_accuracy",)}
"""Task -> those that are a share of labels or pairs, of which a sample or a group has several."""

Metrics = dict[str, float]
"""Metric -> its value, NaN where it is undefined."""


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
    """Return the metrics of a task.

    Macro averages are over the labels that some samples have and some have not. `ece` is the expected calibration
    error: of the positive label, of the likeliest one (`multiclass`), of all labels together (`multilabel`).
    `spearman` of `ordinal` ranks by the expected label; `kappa` has quadratic weights (Cohen 1968).

    Samples are resampled one by one; `pairwise` resamples whole groups, unless there is only one. Resamples for which
    a metric is undefined are left out of its interval. Shares of samples have Wilson's interval, see `SHARES`.

    Args:
        task: a name of `NUM_OUTPUTS_BY_TASK`.
        outputs: `(N, K)`, the head's raw outputs.
        targets: `(N,)`, or `(N, C)` for `multilabel`, see `calibration.validate_outputs`.
        calibration: temperature and thresholds from validation data.
        groups: `(N,)`, for `pairwise` alone: only samples of the same group are compared.
        num_resamples: number of bootstrap resamples; 0: no intervals.
        seed: seeds the resamples.

    Raises:
        ValueError: data that `calibration.validate_outputs` refuses, or groups that are missing or not taken.
    """
    outputs, targets = validate_outputs(task, outputs, targets)
    if task == "pairwise":
        return _pairwise_scores(outputs[:, 0], targets, validate_groups(groups, len(targets)), num_resamples, seed)
    if groups is not None:
        raise ValueError(f"groups: {task} has none, only pairwise compares within groups")
    decisions = calibration.choose_labels(task, outputs)
    ranking = calibration.probabilities(task, outputs) if task in CLASSIFICATION_TASKS else decisions
    metrics = TASK_METRICS[task]
    return _bootstrap(
        lambda rows: metrics(targets[rows], decisions[rows], ranking[rows]), len(targets), num_resamples, seed, task
    )


def baseline(
    task: str,
    train_targets: np.ndarray,
    targets: np.ndarray,
    *,
    num_labels: int,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Return the metrics of a constant prediction, on the same resamples as `scores`.

    The constant is the most frequent training label, the first of several (`multilabel`: for each label whether most
    samples have it), the mean (`regression`), the median (`ordinal`, the lower of two), or one score for all
    (`pairwise`). Metrics of ranks and probabilities are left out.

    Args:
        task: a name of `NUM_OUTPUTS_BY_TASK`.
        train_targets: `(M,)`, or `(M, C)` for `multilabel`, targets of the training data.
        targets: `(N,)` or `(N, C)`, targets of the evaluation data.
        num_labels: C; ignored by tasks without labels.
        num_resamples: number of bootstrap resamples; 0: no intervals.
        seed: seeds the resamples.

    Raises:
        ValueError: data that `calibration.validate_targets` refuses.
    """
    train_targets = validate_targets(task, train_targets, num_labels)
    targets = validate_targets(task, targets, num_labels)
    if task == "pairwise":
        return {"pair_accuracy": Score(0.5, 0.5, 0.5) if num_resamples else Score(0.5)}
    if task == "regression":
        constant = train_targets.mean()
    elif task == "ordinal":
        constant = np.quantile(train_targets, 0.5, method="inverted_cdf")
    elif task == "multilabel":
        constant = (train_targets.mean(axis=0) > 0.5).astype(np.int64)
    else:
        constant = np.bincount(train_targets).argmax()
    decisions = np.full(targets.shape, constant)
    metrics = TASK_METRICS[task]
    return _bootstrap(lambda rows: metrics(targets[rows], decisions[rows]), len(targets), num_resamples, seed, task)


def _bootstrap(
    compute_metrics: Callable[[np.ndarray], Metrics], num_units: int, num_resamples: int, seed: int, task: str
) -> dict[str, Score]:
    """`bootstrap` without scikit-learn's own checks of its arguments, which take a third of the time."""
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return bootstrap(
            compute_metrics,
            num_units,
            num_resamples,
            seed,
            shares=SHARES.get(task, ()),
            clustered_shares=CLUSTERED_SHARES.get(task, ()),
        )


def _binary_metrics(targets: np.ndarray, decisions: np.ndarray, probs: np.ndarray | None = None) -> Metrics:
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets,
        decisions,
        average="binary",
        zero_division=np.nan,  # pyright: ignore[reportArgumentType]: NaN is allowed
    )
    found = {"accuracy": accuracy_score(targets, decisions), "f1": f1, "precision": precision, "recall": recall}
    if probs is None:
        return found
    areas = _ranking_metrics(targets[:, None], probs[:, 1:])
    return areas | found | {"ece": _calibration_error(targets, probs[:, 1])}


def _multiclass_metrics(targets: np.ndarray, decisions: np.ndarray, probs: np.ndarray | None = None) -> Metrics:
    present = np.unique(targets)
    f1 = f1_score(targets, decisions, labels=present, average="macro") if len(present) > 1 else np.nan
    found = {"accuracy": accuracy_score(targets, decisions), "f1": f1}
    if probs is None:
        return found
    num_labels = probs.shape[1]
    ece = classification.multiclass_calibration_error(
        torch.from_numpy(probs), torch.from_numpy(targets), num_labels, n_bins=NUM_BINS, validate_args=False
    )
    return found | _ranking_metrics(np.eye(num_labels, dtype=np.int64)[targets], probs) | {"ece": ece.item()}


def _multilabel_metrics(targets: np.ndarray, decisions: np.ndarray, probs: np.ndarray | None = None) -> Metrics:
    both = _has_both_classes(targets)
    preds, target = torch.from_numpy(decisions), torch.from_numpy(targets)
    f1 = classification.multilabel_f1_score(preds, target, targets.shape[1], average="none", validate_args=False)
    found = {
        "f1": f1.reshape(-1).numpy()[both].mean() if both.any() else np.nan,  # a single label gives a scalar
        "accuracy": accuracy_score(targets.ravel(), decisions.ravel()),
        "exact_match": accuracy_score(targets, decisions),
    }
    if probs is None:
        return found
    return _ranking_metrics(targets, probs) | found | {"ece": _calibration_error(targets.ravel(), probs.ravel())}


def _has_both_classes(targets: np.ndarray) -> np.ndarray:
    """Return which labels some samples have and some have not: `(N, C) -> (C,)`."""
    return targets.min(axis=0) < targets.max(axis=0)


def _calibration_error(targets: np.ndarray, probs: np.ndarray) -> float:
    """Return the expected calibration error of positive labels: `(N,), (N,)`."""
    preds, target = torch.tensor(probs), torch.tensor(targets)
    return classification.binary_calibration_error(preds, target, n_bins=NUM_BINS, validate_args=False).item()


def _ranking_metrics(targets: np.ndarray, probs: np.ndarray) -> Metrics:
    """Return macro areas under the ROC and the precision-recall curve from `(N, C)` targets and `(N, C)` probabilities.

    torchmetrics computes the same areas as scikit-learn in a fifth of the time.
    """
    areas = {"auroc": classification.binary_auroc, "average_precision": classification.binary_average_precision}
    labels = np.flatnonzero(_has_both_classes(targets))
    if not len(labels):
        return dict.fromkeys(areas, np.nan)
    columns = [(torch.tensor(probs[:, label]), torch.tensor(targets[:, label])) for label in labels]
    found = {}
    for name, area in areas.items():
        values = [area(preds, target, validate_args=False).item() for preds, target in columns]
        found[name] = float(np.mean(values))
    return found


def _regression_metrics(targets: np.ndarray, decisions: np.ndarray, ranking: np.ndarray | None = None) -> Metrics:
    found = {
        "mae": mean_absolute_error(targets, decisions),
        "rmse": root_mean_squared_error(targets, decisions),
        "r2": r2_score(targets, decisions) if np.ptp(targets) else np.nan,
    }
    return found if ranking is None else found | {"spearman": _rank_correlation(targets, ranking)}


def _ordinal_metrics(targets: np.ndarray, decisions: np.ndarray, probs: np.ndarray | None = None) -> Metrics:
    labels = np.arange(max(targets.max(), decisions.max()) + 1)  # steps are counted between label indices
    disagree = len(np.unique([targets, decisions])) > 1  # kappa is undefined without disagreement
    found = {
        "accuracy": accuracy_score(targets, decisions),
        "mae": mean_absolute_error(targets, decisions),
        "kappa": cohen_kappa_score(targets, decisions, labels=labels, weights="quadratic") if disagree else np.nan,
    }
    if probs is None:
        return found
    return found | {"spearman": _rank_correlation(targets, probs @ np.arange(probs.shape[1]))}


TASK_METRICS = {
    "binary": _binary_metrics,
    "multiclass": _multiclass_metrics,
    "multilabel": _multilabel_metrics,
    "regression": _regression_metrics,
    "ordinal": _ordinal_metrics,
}
"""Task -> its metrics, from targets, decisions and what samples are ranked by: probabilities, or numbers `(N,)`.

A constant prediction ranks nothing, and has no metrics of ranks. `pairwise` has `_pairwise_scores`.
"""


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN where one side is constant."""
    if not np.ptp(first) or not np.ptp(second):
        return np.nan
    return spearmanr(first, second).statistic  # pyright: ignore[reportAttributeAccessIssue]: typed as a bare tuple


def validate_groups(groups: np.ndarray | None, num_samples: int) -> np.ndarray:
    """Return the groups of `pairwise`, `(N,)`; raise ValueError where they are missing or have another shape."""
    if groups is None or np.shape(groups) != (num_samples,):
        shape = None if groups is None else np.shape(groups)
        raise ValueError(f"groups of pairwise: got {shape}, expected the group of each of {num_samples} samples")
    return np.asarray(groups)


def _pairwise_scores(
    predicted: np.ndarray, relevance: np.ndarray, groups: np.ndarray, num_resamples: int, seed: int
) -> dict[str, Score]:
    """Return `pair_accuracy` over all pairs, and `spearman`, the mean over groups where it is defined.

    Statistics of a group are computed once, since groups are resampled whole, unless there is only one.
    """

    def statistics(rows: np.ndarray) -> np.ndarray:
        """Return the statistics of the group that these rows are."""
        return _group_statistics(predicted[rows], relevance[rows])

    table = np.array([statistics(np.flatnonzero(groups == group)) for group in np.unique(groups)])
    if len(table) == 1:
        rest = len(predicted), num_resamples, seed, "pairwise"
        return _bootstrap(lambda rows: _aggregate_groups(statistics(rows)[None]), *rest)
    return _bootstrap(lambda rows: _aggregate_groups(table[rows]), len(table), num_resamples, seed, "pairwise")


def _aggregate_groups(table: np.ndarray) -> Metrics:
    """Return metrics from the statistics of groups: `(groups, 3)`."""
    right, pairs, spearman = table.T
    defined = spearman[~np.isnan(spearman)]
    return {
        "pair_accuracy": right.sum() / pairs.sum() if pairs.any() else np.nan,
        "spearman": defined.mean() if len(defined) else np.nan,
    }


def _group_statistics(predicted: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Return correctly ordered pairs, pairs that have an order, and the rank correlation of one group: `(3,)`.

    Correct minus wrong pairs are Kendall's tau-b without its correction for ties (Kendall 1945); a tie of scores counts
    as half a correct pair.
    """
    pairs, predicted_pairs = _count_unequal_pairs(relevance), _count_unequal_pairs(predicted)
    if not pairs or not predicted_pairs:
        return np.array([pairs / 2, pairs, np.nan])
    excess = kendalltau(relevance, predicted)[0] * np.sqrt(pairs * predicted_pairs)
    return np.array([(pairs + np.rint(excess)) / 2, pairs, _rank_correlation(relevance, predicted)])


def _count_unequal_pairs(values: np.ndarray) -> float:
    """Return the number of pairs with different values, from values `(N,)`."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return (len(values) ** 2 - (counts**2).sum()) / 2


def confusion(
    task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration, num_labels: int
) -> np.ndarray | None:
    """Return the confusion matrix of a task's decisions; arguments as in `scores`, `num_labels` is C.

    Returns:
        `(C, C)`, a row for each true label; `multilabel`: `(C, 2, 2)`, one matrix for each label; None for tasks
        without labels.

    Raises:
        ValueError: data that `calibration.validate_outputs` refuses.
    """
    outputs, targets = validate_outputs(task, outputs, targets)
    if task not in CLASSIFICATION_TASKS:
        return None
    decisions = calibration.choose_labels(task, outputs)
    if task == "multilabel":  # label by label: multilabel_confusion_matrix takes a single column for two classes
        pairs = zip(targets.T, decisions.T, strict=True)
        return np.stack([confusion_matrix(truth, predicted, labels=[0, 1]) for truth, predicted in pairs])
    return confusion_matrix(targets, decisions, labels=np.arange(num_labels))
