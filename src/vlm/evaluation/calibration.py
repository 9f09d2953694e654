"""Temperature and thresholds that turn a head's raw outputs into probabilities and decisions.

To add a way of choosing a threshold, add it to `THRESHOLD_CRITERIA` and `_find_threshold`.

Shapes: N samples, C labels, K outputs of a head for a sample.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import confusion_matrix_at_thresholds
from torch import Tensor

from vlm.config.choices import THRESHOLD_CRITERIA
from vlm.models.head_tasks import CLASSIFICATION_TASKS, NUM_OUTPUTS_BY_TASK, choose_labels, probabilities

TEMPERATURE_RANGE = (0.05, 20.0)
"""The lowest and the highest temperature tried; without any error on validation data, the best one is unbounded."""

MIN_PROBABILITY = 1e-12
"""Lower bound of a probability whose logarithm is taken: `ordinal` probabilities are differences that rounding can make
0, and that are negative where a head's outputs do not fall from label to label."""


@dataclass(frozen=True)
class Calibration:
    """How a head's outputs become probabilities and decisions.

    Attributes:
        temperature: the divisor of logits.
        threshold: the least probability at which the positive label is chosen (`binary`), or each label (`multilabel`,
            one number each); None: 0.5, or a task without thresholds.
    """

    temperature: float = 1.0
    threshold: float | list[float] | None = None

    def __post_init__(self):
        """Raise ValueError for a temperature that is no number above 0."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: got {self.temperature}, expected a number above 0")

    def probabilities(self, task: str, outputs: np.ndarray) -> np.ndarray:
        """Return label probabilities for a task of `CLASSIFICATION_TASKS`: `(N, K) -> (N, C)`, in float64."""
        return probabilities(task, torch.tensor(outputs, dtype=torch.float64), self.temperature).numpy()

    def choose_labels(self, task: str, outputs: np.ndarray) -> np.ndarray:
        """Return the indices of the chosen labels: `(N, K) -> (N,)`; `multilabel`: 0 or 1 for each label, `(N, C)`.

        Other tasks return the head's first output.
        """
        if task not in CLASSIFICATION_TASKS:
            return np.asarray(outputs, dtype=np.float64)[:, 0]
        probs = self.probabilities(task, outputs)
        return choose_labels(task, torch.from_numpy(probs), self.threshold).numpy().astype(np.int64)


def calibrate(task: str, outputs: np.ndarray, targets: np.ndarray, criterion: str = "f1") -> Calibration:
    """Fit the temperature and the thresholds on validation data.

    The temperature has the least mean negative log-likelihood (Guo et al. 2017, arXiv:1706.04599); it does not change
    decisions of `multiclass`. Thresholds apply to the calibrated probabilities.

    Args:
        task: a name of `NUM_OUTPUTS_BY_TASK`; `regression` and `pairwise` need no calibration.
        outputs: `(N, K)`, the head's raw outputs.
        targets: `(N,)`, or `(N, C)` for `multilabel`, see `validate_outputs`.
        criterion: one of `THRESHOLD_CRITERIA`, for `binary` and each label of `multilabel`.

    Raises:
        ValueError: an unknown criterion, or data that `validate_outputs` refuses.
    """
    if criterion not in THRESHOLD_CRITERIA:
        raise ValueError(f"threshold by: got {criterion!r}, expected one of {', '.join(THRESHOLD_CRITERIA)}")
    outputs, targets = validate_outputs(task, outputs, targets)
    if task not in CLASSIFICATION_TASKS:
        return Calibration()
    temperature = _fit_temperature(task, torch.tensor(outputs), torch.tensor(targets))
    probs = Calibration(temperature).probabilities(task, outputs)
    threshold = None
    if task == "binary":
        threshold = _find_threshold(probs[:, 1], targets, criterion)
    elif task == "multilabel":
        threshold = [_find_threshold(*label, criterion) for label in zip(probs.T, targets.T, strict=True)]
    return Calibration(temperature, threshold)


def _fit_temperature(task: str, outputs: Tensor, targets: Tensor) -> float:
    """Return the temperature with the least mean negative log-likelihood."""

    def loss(log_temperature: float) -> float:
        """Return the mean negative log-likelihood at a temperature."""
        logits = outputs / math.exp(log_temperature)
        if task == "multiclass":
            return F.cross_entropy(logits, targets).item()
        if task == "ordinal":
            return F.nll_loss(probabilities(task, logits).clamp_min(MIN_PROBABILITY).log(), targets).item()
        return F.binary_cross_entropy_with_logits(logits, targets.reshape(logits.shape).double()).item()

    bounds = tuple(map(math.log, TEMPERATURE_RANGE))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def _find_threshold(probs: np.ndarray, truth: np.ndarray, criterion: str) -> float:
    """Return the best threshold of one label from probabilities `(N,)` and truth `(N,)`.

    A threshold lies midway between two probabilities that occur, below all (every sample is positive) or above all
    (none is). Among equally good ones the nearest to 0.5 is taken, the lower of two. 0.5 where only one class occurs.
    """
    if criterion == "none" or truth.min() == truth.max():
        return 0.5
    _, false_positives, _, true_positives, levels = confusion_matrix_at_thresholds(truth, probs)
    if levels[0] < 1:  # above a probability of 1 there is no threshold
        levels = np.append(1.0, levels)
        false_positives, true_positives = np.append(0.0, false_positives), np.append(0.0, true_positives)
    positives, negatives = true_positives[-1], false_positives[-1]
    values = {  # whole numbers or one division of them, so that equally good thresholds compare as equal
        "f1": 2 * true_positives / (true_positives + false_positives + positives),
        "accuracy": true_positives - false_positives,  # plus all negatives: the number of correct decisions
        "youden": true_positives * negatives - false_positives * positives,  # J, times positives and negatives
    }[criterion]
    lower = np.append(levels[1:], 0.0)  # levels fall: the next one is the probability that is no longer positive
    middle = (levels + lower) / 2
    places = np.where(middle > lower, middle, levels)  # rounding may give the lower bound
    best = places[values == values.max()]
    return float(best[np.lexsort((best, abs(best - 0.5)))[0]])


def validate_outputs(task: str, outputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check a head's outputs and targets, and return them in the types that all metrics expect.

    Args:
        task: a name of `NUM_OUTPUTS_BY_TASK`.
        outputs: `(N, K)`: logits, of `regression` values in the label's own unit, of `pairwise` scores.
        targets: `(N,)`: the label's index, the value (`regression`) or the relevance (`pairwise`); `multilabel`: 0 or 1
            for each label, `(N, C)`.

    Returns:
        Outputs in float64; targets in int64, or in float64 for `regression` and `pairwise`.

    Raises:
        ValueError: an unknown task, no data, shapes that do not match, numbers that are not finite, or unknown labels.
    """
    if task not in NUM_OUTPUTS_BY_TASK:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(NUM_OUTPUTS_BY_TASK)}")
    outputs = np.asarray(outputs, dtype=np.float64)
    if outputs.ndim != 2 or not outputs.size:
        raise ValueError(f"outputs of {task}: got shape {outputs.shape}, expected (samples, numbers), at least 1 each")
    num_labels = count_labels(task, outputs.shape[1])
    expected = NUM_OUTPUTS_BY_TASK[task](num_labels)
    if outputs.shape[1] != expected:
        raise ValueError(f"outputs of {task}: got {outputs.shape[1]} numbers a sample, expected {expected}")
    if not np.isfinite(outputs).all():
        raise ValueError(f"outputs of {task}: {(~np.isfinite(outputs)).sum()} of {outputs.size} are not finite")
    targets = validate_targets(task, targets, num_labels)
    if len(targets) != len(outputs):
        raise ValueError(f"{task}: got {len(outputs)} outputs and {len(targets)} targets")
    return outputs, targets


def count_labels(task: str, num_outputs: int) -> int:
    """Return the number of labels of a head with so many outputs; 0 for tasks without labels."""
    counts = {"binary": 2, "ordinal": num_outputs + 1, "regression": 0, "pairwise": 0}
    return counts.get(task, num_outputs)


def validate_targets(task: str, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Check targets, `(N,)` or for `multilabel` `(N, C)`, and return them as `validate_outputs` does.

    Raises:
        ValueError: no data, a shape that does not fit the task, numbers that are not finite, or unknown labels.
    """
    targets = np.asarray(targets)
    labels, shape = (f", {num_labels}", (num_labels,)) if task == "multilabel" else (",", ())
    if not targets.size or targets.ndim != 1 + len(shape) or targets.shape[1:] != shape:
        raise ValueError(f"targets of {task}: got shape {targets.shape}, expected (samples{labels}), at least 1")
    if not np.isfinite(targets).all():
        raise ValueError(f"targets of {task}: {(~np.isfinite(targets)).sum()} of {targets.size} are not finite")
    if task not in CLASSIFICATION_TASKS:
        return targets.astype(np.float64)
    numbers = np.arange(2 if task == "multilabel" else num_labels)
    unknown = np.setdiff1d(targets, numbers)
    if len(unknown):
        raise ValueError(f"targets of {task}: got {unknown[:5].tolist()}, expected 0 to {numbers[-1]}")
    return targets.astype(np.int64)
