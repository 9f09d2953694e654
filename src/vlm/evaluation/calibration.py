"""What turns the raw numbers of a prediction head into probabilities and decisions to rely on.

May import `vlm.models.head_tasks`. To add a way of choosing a threshold, add it to `THRESHOLD_CRITERIA` and `_goodness`.

Shapes: N samples, C labels, K numbers that a head gives for a sample.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import confusion_matrix_at_thresholds
from torch import Tensor

from vlm.models.head_tasks import CLASSIFICATION_TASKS, NUM_OUTPUTS_BY_TASK, choose_labels, probabilities

THRESHOLD_CRITERIA = ("f1", "accuracy", "youden", "none")
"""What a threshold can be the best by: F1 of the positive label, the share decided rightly, sensitivity + specificity
- 1 (Youden 1950); `none` leaves it at 0.5."""

TEMPERATURE_RANGE = (0.05, 20.0)
"""The lowest and the highest temperature looked at. Validation data that is decided without any error wants one
without end."""

MIN_PROBABILITY = 1e-12
"""Taken for a probability that is smaller, where its logarithm is needed: `ordinal` probabilities are differences,
which rounding makes 0, or which are below it where a head's numbers do not fall from label to label."""


@dataclass(frozen=True)
class Calibration:
    """How the numbers of a head are read.

    Attributes:
        temperature: what logits are divided by.
        threshold: from which probability on the positive label is decided (`binary`), or each label (`multilabel`, one
            number for each); None: 0.5, and for tasks that have none.
    """

    temperature: float = 1.0
    threshold: float | list[float] | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: got {self.temperature}, expected a number above 0")

    def probabilities(self, task: str, outputs: np.ndarray) -> np.ndarray:
        """Probabilities of labels, for one of `CLASSIFYING`: `(N, K) -> (N, C)`, in float64."""
        return probabilities(task, torch.tensor(outputs, dtype=torch.float64), self.temperature).numpy()

    def choose_labels(self, task: str, outputs: np.ndarray) -> np.ndarray:
        """Numbers of the decided labels: `(N, K) -> (N,)`; of `multilabel` 0 or 1 for each, `(N, C)`.

        The other tasks decide nothing: what they predict is the number that the head gives.
        """
        if task not in CLASSIFICATION_TASKS:
            return np.asarray(outputs, dtype=np.float64)[:, 0]
        probs = self.probabilities(task, outputs)
        return choose_labels(task, torch.from_numpy(probs), self.threshold).numpy().astype(np.int64)


def calibrate(task: str, outputs: np.ndarray, targets: np.ndarray, criterion: str = "f1") -> Calibration:
    """The temperature and the thresholds that fit; give it validation data only.

    The temperature has the least mean negative log-likelihood (Guo et al. 2017, arXiv:1706.04599). It leaves the
    decisions of `multiclass` alone. Thresholds are for the probabilities that it gives.

    Args:
        task: one of `TASKS`; `regression` and `pairwise` need no calibration.
        outputs: `(N, K)`, the raw numbers of its head.
        targets: `(N,)`, or `(N, C)` for `multilabel`, see `checked`.
        criterion: one of `THRESHOLD_CRITERIA`, for `binary` and each label of `multilabel`.

    Raises:
        ValueError: by another name, or data that `checked` refuses.
    """
    if criterion not in THRESHOLD_CRITERIA:
        raise ValueError(f"threshold by: got {criterion!r}, expected one of {', '.join(THRESHOLD_CRITERIA)}")
    outputs, targets = validate_outputs(task, outputs, targets)
    if task not in CLASSIFICATION_TASKS:
        return Calibration()
    found = Calibration(_fit_temperature(task, torch.tensor(outputs), torch.tensor(targets)))
    probs = found.probabilities(task, outputs)
    if task == "binary":
        return Calibration(found.temperature, _find_threshold(probs[:, 1], targets, criterion))
    if task == "multilabel":
        thresholds = [_find_threshold(*label, criterion) for label in zip(probs.T, targets.T, strict=True)]
        return Calibration(found.temperature, thresholds)
    return found


def _fit_temperature(task: str, outputs: Tensor, targets: Tensor) -> float:
    """The temperature of the least mean negative log-likelihood."""

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        if task == "multiclass":
            return F.cross_entropy(outputs / temperature, targets).item()
        if task == "ordinal":
            probs = probabilities(task, outputs, temperature)
            return F.nll_loss(probs.clamp_min(MIN_PROBABILITY).log(), targets).item()
        wanted = targets.reshape(outputs.shape).to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs / temperature, wanted).item()

    bounds = tuple(map(math.log, TEMPERATURE_RANGE))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def _find_threshold(probs: np.ndarray, truth: np.ndarray, criterion: str) -> float:
    """The best threshold of one label: `(N,), (N,) -> a probability`.

    It lies midway between two probabilities that occur, below all of them (every sample is positive) or above (none
    is). Among equally good ones it is that nearest to 0.5, of two as near the lower. 0.5 where only one class occurs.
    """
    if criterion == "none" or truth.min() == truth.max():
        return 0.5
    true_negatives, false_positives, false_negatives, true_positives, levels = confusion_matrix_at_thresholds(
        truth, probs
    )
    criterion_values = _criterion_values(criterion, true_negatives, false_positives, false_negatives, true_positives)
    lower = np.append(levels[1:], 0.0)  # levels fall: the next one is the probability that is no longer positive
    places = _midpoints(levels, lower)
    if levels[0] < 1:  # above a probability of 1 there is no threshold
        zero, positives, negatives = np.zeros(1), true_positives[-1:], false_positives[-1:]
        criterion_values = np.append(criterion_values, _criterion_values(criterion, negatives, zero, positives, zero))
        places = np.append(places, _midpoints(np.ones(1), levels[:1]))
    best = places[criterion_values == criterion_values.max()]
    return float(best[np.lexsort((best, abs(best - 0.5)))[0]])


def _midpoints(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Midway; the upper one where they are so near that rounding would give the lower."""
    middle = (upper + lower) / 2
    return np.where(middle > lower, middle, upper)


def _criterion_values(
    criterion: str,
    true_negatives: np.ndarray,
    false_positives: np.ndarray,
    false_negatives: np.ndarray,
    true_positives: np.ndarray,
) -> np.ndarray:
    """What a threshold is chosen by, from true negatives, false positives, false negatives and true positives.

    Whole numbers or one division of such, so that equally good thresholds compare as equal.
    """
    if criterion == "f1":
        return 2 * true_positives / (2 * true_positives + false_positives + false_negatives)
    if criterion == "accuracy":
        return true_positives + true_negatives
    return true_positives * (true_negatives + false_positives) - false_positives * (
        true_positives + false_negatives
    )  # Youden's J, times positives and negatives


def validate_outputs(task: str, outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of a head and their targets, as every function here and in `scores` wants them.

    Args:
        task: one of `TASKS`.
        outputs: `(N, K)`: logits, of `regression` values in the label's own unit, of `pairwise` scores.
        targets: `(N,)`: the label's number, of `regression` a value, of `pairwise` how relevant a sample is; of
            `multilabel` 0 or 1 for each label, `(N, C)`.

    Returns:
        Outputs in float64; targets in int64, of `regression` and `pairwise` in float64.

    Raises:
        ValueError: another task, no data, shapes that do not fit, or numbers that are not finite or no label.
    """
    if task not in NUM_OUTPUTS_BY_TASK:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(NUM_OUTPUTS_BY_TASK)}")
    outputs = np.asarray(outputs, dtype=np.float64)
    if outputs.ndim != 2 or not outputs.size:
        raise ValueError(f"outputs of {task}: got shape {outputs.shape}, expected (samples, numbers), at least 1 each")
    labels = {"multiclass": outputs.shape[1], "multilabel": outputs.shape[1], "ordinal": outputs.shape[1] + 1}
    num_labels = labels.get(task, 2)
    if outputs.shape[1] != NUM_OUTPUTS_BY_TASK[task](num_labels):
        raise ValueError(
            f"outputs of {task}: got {outputs.shape[1]} numbers a sample, expected {NUM_OUTPUTS_BY_TASK[task](2)}"
        )
    if not np.isfinite(outputs).all():
        raise ValueError(f"outputs of {task}: {(~np.isfinite(outputs)).sum()} of {outputs.size} are not finite")
    targets = validate_targets(task, targets, num_labels)
    if len(targets) != len(outputs):
        raise ValueError(f"{task}: got {len(outputs)} outputs and {len(targets)} targets")
    return outputs, targets


def validate_targets(task: str, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Targets alone, as `checked` gives them."""
    targets = np.asarray(targets)
    labels, shape = (f", {num_labels}", (num_labels,)) if task == "multilabel" else (",", ())
    if not targets.size or targets.ndim != 1 + len(shape) or targets.shape[1:] != shape:
        raise ValueError(f"targets of {task}: got shape {targets.shape}, expected (samples{labels}), at least 1")
    if not np.isfinite(targets).all():
        raise ValueError(f"targets of {task}: {(~np.isfinite(targets)).sum()} of {targets.size} are not finite")
    if task not in CLASSIFICATION_TASKS:
        return targets.astype(np.float64)
    numbers = np.arange(2 if task == "multilabel" else num_labels)
    strange = np.setdiff1d(targets, numbers)
    if len(strange):
        raise ValueError(f"targets of {task}: got {strange[:5].tolist()}, expected 0 to {numbers[-1]}")
    return targets.astype(np.int64)
