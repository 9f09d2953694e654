"""What the predictions of a head look like: its curves, its reliability, its mistakes, as PNGs.

May import `vlm.evaluation.calibration` and `vlm.evaluation.head_metrics`. To add a plot, draw it in a
function of its own and write it in `plot_head_scores`.

Shapes: N samples, C labels, K numbers that a head gives for a sample.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, average_precision_score, confusion_matrix, precision_recall_curve, roc_curve

from vlm.evaluation.calibration import Calibration, validate_outputs
from vlm.evaluation.head_metrics import NUM_BINS, confusion, validate_groups

DPI = 120
MAX_LEGEND = 12
"""Most labels that a legend lists; more would hide the curves."""
MAX_NUMBERS = 30
"""Most labels whose counts are written into the cells of a confusion matrix; beyond, colours have to do."""
MAX_TICK_LABELS = 40
"""About how many names of labels fit along an axis."""
MAX_NAME = 24
"""Most characters of a label's name."""
DRAW_STYLES = {"roc": "default", "precision_recall": "steps-post"}
"""How the points of a curve are joined: precision between two points is not on the line between them."""
CURVE_GRID = np.linspace(0, 1, 501)
"""Where curves of several labels are averaged."""


def plot_head_scores(
    task: str,
    outputs: np.ndarray,
    targets: np.ndarray,
    calibration: Calibration,
    labels: Sequence[str],
    folder: Path,
    *,
    groups: np.ndarray | None = None,
) -> list[Path]:
    """Write the plots of a task; a curve that no label has, as one class of it is missing, is not written.

    `roc.png`, `precision_recall.png` (`binary`, `multiclass`, `multilabel`), `calibration.png` (`binary`,
    `multiclass`), `confusion.png` (`binary`, `multiclass`, `ordinal`), `predictions.png` (`regression`), `scores.png`
    (`pairwise`).

    Args:
        task: one of `TASKS`.
        outputs: `(N, K)`, the raw numbers of its head.
        targets: `(N,)`, or `(N, C)` for `multilabel`, see `calibration.checked`.
        calibration: from validation data.
        labels: their C names in order; none for `regression` and `pairwise`.
        folder: where to write; made if need be.
        groups: `(N,)`, for `pairwise` alone.

    Returns:
        The files.

    Raises:
        ValueError: data that `calibration.checked` refuses, too few or too many names, groups of a wrong shape.
    """
    outputs, targets = validate_outputs(task, outputs, targets)
    wanted = {"binary": 2, "ordinal": outputs.shape[1] + 1, "regression": 0, "pairwise": 0}
    if len(labels) != wanted.get(task, outputs.shape[1]):
        raise ValueError(f"labels of {task}: got {len(labels)}, expected {wanted.get(task, outputs.shape[1])}")
    figures: dict[str, Figure | None] = {}
    if task in ("binary", "multiclass", "multilabel"):
        figures = {
            "roc": _plot_curves(task, outputs, targets, calibration, labels, "roc"),
            "precision_recall": _plot_curves(task, outputs, targets, calibration, labels, "precision_recall"),
        }
    if task in ("binary", "multiclass"):
        figures["calibration"] = _plot_reliability(task, outputs, targets, calibration)
    counts = None if task == "multilabel" else confusion(task, outputs, targets, calibration, len(labels))
    if counts is not None:
        figures["confusion"] = _plot_confusion(counts, labels)
    if task == "regression":
        figures["predictions"] = _plot_predictions(outputs[:, 0], targets)
    if task == "pairwise":
        figures["scores"] = _plot_scores(outputs[:, 0], targets, validate_groups(groups, len(targets)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
    return paths


def _plot_curves(
    task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration, labels: Sequence[str], kind: str
) -> Figure | None:
    """`roc` or `precision_recall`, of the labels that some samples have and some have not; None without any."""
    probs = calibration.probabilities(task, outputs)
    truth = targets if task == "multilabel" else np.eye(len(labels), dtype=np.int64)[targets]
    both = np.flatnonzero(truth.min(axis=0) < truth.max(axis=0))
    shown: list[int] = [1] * (1 in both) if task == "binary" else both.tolist()
    if not shown:
        return None
    compute_curve = _roc_curve if kind == "roc" else _precision_recall_curve
    curves = [compute_curve(truth[:, label], probs[:, label]) for label in shown]
    legend = len(shown) <= MAX_LEGEND
    figure = Figure(figsize=(9, 5.5) if legend and len(shown) > 1 else (6, 5.5), layout="constrained")
    axes = figure.subplots()
    for place, (label, (x, y, area)) in enumerate(zip(shown, curves, strict=True)):
        style = {"alpha": 0.5, "linewidth": 1} if len(shown) > 1 else {}
        style |= {"linestyle": "-" if place < 10 else "--"}  # there are 10 colours
        style |= {"label": f"{_shorten(labels[label])} ({area:.3f})"} if legend else {"color": "tab:gray"}
        axes.plot(x, y, drawstyle=DRAW_STYLES[kind], **style)
    if len(shown) > 1:
        mean = np.mean([_interpolate(kind, x, y) for x, y, _ in curves], axis=0)
        area = np.mean([area for _, _, area in curves])
        axes.plot(CURVE_GRID, mean, color="black", linewidth=2, label=f"mean of {len(shown)} labels ({area:.3f})")
    if task == "binary":
        _mark_threshold(axes, kind, targets, calibration.choose_labels(task, outputs), calibration.threshold)
    _decorate_axes(axes, kind, truth[:, shown].mean())
    if legend and len(shown) > 1:
        figure.legend(loc="outside right center", fontsize=9)
    else:
        axes.legend(loc="lower right" if kind == "roc" else "lower left", fontsize=9)
    return figure


def _roc_curve(truth: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False positive rate, true positive rate and area of one label."""
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, probs)
    return false_positive_rate, true_positive_rate, float(auc(false_positive_rate, true_positive_rate))


def _precision_recall_curve(truth: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Recall, precision and average precision of one label."""
    precision, recall, _ = precision_recall_curve(truth, probs)
    return recall, precision, float(average_precision_score(truth, probs))


def _interpolate(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A curve at the points of `GRID`."""
    if kind == "roc":
        return np.interp(CURVE_GRID, x, y)
    wanted = np.maximum(CURVE_GRID, CURVE_GRID[1])  # at a recall of 0 a curve ends at 1, whatever its precision
    at_least = np.searchsorted(x[::-1], wanted)  # recall falls along the curve; precision is a step up to each recall
    return y[::-1][at_least]


def _mark_threshold(
    axes: Axes, kind: str, targets: np.ndarray, decisions: np.ndarray, threshold: float | list[float] | None
) -> None:
    """Where on the curve of `binary` decisions are made; nowhere where precision is undefined."""
    (true_negatives, false_positives), (false_negatives, true_positives) = confusion_matrix(
        targets, decisions, labels=[0, 1]
    )
    recall = true_positives / (true_positives + false_negatives)
    if kind == "roc":
        x, y = false_positives / (false_positives + true_negatives), recall
    elif true_positives + false_positives:
        x, y = recall, true_positives / (true_positives + false_positives)
    else:
        return
    label = f"threshold {0.5 if threshold is None else threshold:.3f}"
    axes.plot(x, y, "o", color="tab:red", markersize=8, clip_on=False, zorder=3, label=label)


def _decorate_axes(axes: Axes, kind: str, share: float) -> None:
    """Axes of a curve, with what chance gives; `share` of the samples are positive."""
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="chance")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC (area)")
    else:
        axes.axhline(share, color="black", linestyle=":", linewidth=1, label=f"positive samples ({share:.3f})")
        axes.set(xlabel="recall", ylabel="precision", title="Precision and recall (average precision)")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)


def _plot_reliability(task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration) -> Figure:
    """How often what is said with some probability is so, before and after the temperature.

    Of `binary` the probability of the positive label, of `multiclass` that of the likeliest one.
    """
    figure = Figure(figsize=(6, 7), layout="constrained")
    curves, histogram = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    curves.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="perfect")
    bins = np.linspace(0, 1, NUM_BINS + 1)
    for temperature, color, name in ((1.0, "tab:gray", "before"), (calibration.temperature, "tab:blue", "after")):
        probs = Calibration(temperature).probabilities(task, outputs)
        claimed, observed = probs[:, 1], targets
        if task == "multiclass":
            claimed, observed = probs.max(axis=1), probs.argmax(axis=1) == targets
        share, mean = calibration_curve(observed, claimed, n_bins=NUM_BINS, pos_label=1)
        curves.plot(mean, share, "o-", color=color, markersize=5, label=f"{name}: temperature {temperature:.2f}")
        histogram.hist(claimed, bins=bins, color=color, histtype="step", linewidth=1.5)
    what = "of the positive label" if task == "binary" else "of the likeliest label"
    curves.set(ylabel="share that is so", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02), title=f"Calibration {what}")
    histogram.set(xlabel=f"probability {what}", ylabel="samples")
    histogram.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    curves.legend(loc="upper left", fontsize=9)
    for axes in (curves, histogram):
        axes.grid(alpha=0.3)
    return figure


def _plot_confusion(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Counts, and what share of a row they are: `(C, C)`."""
    size = float(np.clip(0.36 * len(labels), 3.2, 12))
    label_margin = 0.08 * max(len(_shorten(label)) for label in labels)
    figure = Figure(figsize=(2 * (size + label_margin + 0.7), size + label_margin + 1), layout="compressed")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for axes, values, title in zip(
        figure.subplots(1, 2), (counts, shares), ("samples", "share of the true label"), strict=True
    ):
        top = max(float(values.max()), 1.0)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=top)
        places = range(0, len(labels), -(-len(labels) // MAX_TICK_LABELS))
        small = 9 if len(labels) <= 20 else 7
        names = [_shorten(labels[place]) for place in places]
        axes.set_xticks(places, names, rotation=90 if label_margin > size / len(labels) else 0, fontsize=small)
        axes.set_yticks(places, names, fontsize=small)
        axes.set(xlabel="decided", ylabel="true", title=title)
        if len(labels) <= MAX_NUMBERS:
            _annotate_cells(axes, values, top)
    return figure


def _annotate_cells(axes: Axes, values: np.ndarray, top: float) -> None:
    """Numbers in the cells of a matrix; of a large one zeros are left out, so that the others stand out."""
    small = 10 if len(values) <= 8 else 9 if len(values) <= 15 else 7
    for (row, column), value in np.ndenumerate(values):
        if value or len(values) <= 8:
            text = f"{value:d}" if values.dtype.kind == "i" else f"{value:.2f}".replace("0.", ".", len(values) > 8)
            color = "white" if value > 0.6 * top else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=small, color=color)


def _plot_predictions(predicted: np.ndarray, targets: np.ndarray) -> Figure:
    """Predicted over true values, and what is left: `(N,), (N,)`."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    over, left = figure.subplots(1, 2)
    style = {"s": 12, "alpha": min(1.0, max(0.1, 300 / len(targets))), "linewidths": 0, "rasterized": True}
    over.scatter(targets, predicted, **style)
    ends = [min(targets.min(), predicted.min()), max(targets.max(), predicted.max())]
    over.plot(ends, ends, color="black", linestyle=":", linewidth=1, label="predicted = true")
    over.set(xlabel="true", ylabel="predicted", title="Predictions")
    over.set_aspect("equal", adjustable="datalim")
    over.legend(loc="upper left", fontsize=9)
    left.scatter(predicted, predicted - targets, **style)
    left.axhline(0, color="black", linestyle=":", linewidth=1)
    bias = float((predicted - targets).mean())
    left.axhline(bias, color="tab:red", linewidth=1, label=f"mean {bias:.3g}")
    left.set(xlabel="predicted", ylabel="predicted - true", title="Residuals")
    left.legend(loc="upper left", fontsize=9)
    for axes in (over, left):
        axes.grid(alpha=0.3)
    return figure


def _plot_scores(predicted: np.ndarray, relevance: np.ndarray, groups: np.ndarray) -> Figure:
    """Scores less their group's mean, as only those of a group are compared, by relevance: `(N,), (N,), (N,)`."""
    _, group = np.unique(groups, return_inverse=True)
    centred = predicted - (np.bincount(group, weights=predicted) / np.bincount(group))[group]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    levels = np.unique(relevance)
    if len(levels) <= MAX_LEGEND:
        rows = [centred[relevance == level] for level in levels]
        axes.boxplot(rows, tick_labels=[f"{level:g}\n({len(row)})" for level, row in zip(levels, rows, strict=True)])
        axes.set_xlabel("relevance (samples)")
    else:
        axes.scatter(relevance, centred, s=12, alpha=min(1.0, max(0.1, 300 / len(predicted))), linewidths=0)
        axes.set_xlabel("relevance")
    axes.set(ylabel="score - mean score of its group", title="Scores by relevance")
    axes.grid(alpha=0.3)
    return figure


def _shorten(name: str) -> str:
    """A label's name, its middle left out where it is long, as plain text to matplotlib."""
    name = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return name.replace("$", r"\$")  # else it begins a formula
