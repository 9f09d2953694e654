"""Plots of a head's predictions as PNG files: curves, reliability and mistakes.

To add a plot, draw it in a function and call that in `plot_head_scores`.

Shapes: N samples, C labels, K outputs of a head for a sample.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

from vlm.evaluation.calibration import Calibration, count_labels, validate_outputs
from vlm.evaluation.head_metrics import NUM_BINS, confusion, validate_groups

DPI = 120
MAX_LEGEND = 12
"""The largest number of labels in a legend; more would hide the curves."""
MAX_NUMBERS = 30
"""The largest number of labels for which a confusion matrix shows numbers, not only colours."""
MAX_TICK_LABELS = 40
"""The largest number of labels named along an axis."""
MAX_NAME = 24
"""The largest number of characters of a label's name."""
DRAW_STYLES = {"roc": "default", "precision_recall": "steps-post"}
"""Line style of a curve: precision between two points does not lie on the straight line between them."""
CURVE_GRID = np.linspace(0, 1, 501)
"""Points at which curves of several labels are averaged."""
DOTTED = {"color": "black", "linestyle": ":", "linewidth": 1}
"""Style of a line to compare with."""


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
    """Write the plots of a task; a curve is left out where no label has both positive and negative samples.

    `roc.png`, `precision_recall.png` (`binary`, `multiclass`, `multilabel`), `calibration.png` (`binary`,
    `multiclass`), `confusion.png` (`binary`, `multiclass`, `ordinal`), `predictions.png` (`regression`), `scores.png`
    (`pairwise`).

    Outputs and targets are those that `calibration.validate_outputs` takes; `labels` are the C names of labels, in
    order; `groups`, `(N,)`, are for `pairwise` only. Returns the paths of the plots.

    Raises:
        ValueError: data that `calibration.validate_outputs` refuses, too few or too many names, or groups of a wrong
            shape.
    """
    outputs, targets = validate_outputs(task, outputs, targets)
    expected = count_labels(task, outputs.shape[1])
    if len(labels) != expected:
        raise ValueError(f"labels of {task}: got {len(labels)}, expected {expected}")
    figures: dict[str, Figure | None] = {}
    if task in ("binary", "multiclass", "multilabel"):
        figures |= {kind: _plot_curves(task, outputs, targets, calibration, labels, kind) for kind in DRAW_STYLES}
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
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        figure.savefig(path, dpi=DPI)
    return list(drawn)


def _plot_curves(
    task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration, labels: Sequence[str], kind: str
) -> Figure | None:
    """Plot `roc` or `precision_recall` of the labels with both positive and negative samples; None without any."""
    probs = calibration.probabilities(task, outputs)
    truth = targets if task == "multilabel" else np.eye(len(labels), dtype=np.int64)[targets]
    defined: list[int] = np.flatnonzero(truth.min(axis=0) < truth.max(axis=0)).tolist()
    plotted = [label for label in defined if task != "binary" or label == 1]  # of `binary`, the positive label
    if not plotted:
        return None
    curves = [_compute_curve(kind, truth[:, label], probs[:, label]) for label in plotted]
    several, legend = len(plotted) > 1, len(plotted) <= MAX_LEGEND
    figure = Figure(figsize=(9, 5.5) if legend and several else (6, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, (x, y, area)) in enumerate(zip(plotted, curves, strict=True)):
        style = {"alpha": 0.5, "linewidth": 1} if several else {}
        style |= {"linestyle": "-" if number < 10 else "--"}  # there are 10 colours
        style |= {"label": f"{_shorten(labels[label])} ({area:.3f})"} if legend else {"color": "tab:gray"}
        axes.plot(x, y, drawstyle=DRAW_STYLES[kind], **style)
    if several:
        mean = np.mean([_interpolate(kind, x, y) for x, y, _ in curves], axis=0)
        area = np.mean([area for _, _, area in curves])
        axes.plot(CURVE_GRID, mean, color="black", linewidth=2, label=f"mean of {len(plotted)} labels ({area:.3f})")
    if task == "binary":
        _mark_threshold(axes, kind, targets, calibration.choose_labels(task, outputs), calibration.threshold)
    _decorate_axes(axes, kind, truth[:, plotted].mean())
    if legend and several:
        figure.legend(loc="outside right center", fontsize=9)
    else:
        axes.legend(loc="lower right" if kind == "roc" else "lower left", fontsize=9)
    return figure


def _compute_curve(kind: str, truth: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the curve of one label as x and y, and its area; of recall and precision, the average precision."""
    if kind == "roc":
        false_positive_rate, true_positive_rate, _ = roc_curve(truth, probs)
        return false_positive_rate, true_positive_rate, auc(false_positive_rate, true_positive_rate)
    precision, recall, _ = precision_recall_curve(truth, probs)
    return recall, precision, average_precision_score(truth, probs)


def _interpolate(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the values of a curve at the points of `CURVE_GRID`."""
    if kind == "roc":
        return np.interp(CURVE_GRID, x, y)
    recalls = np.maximum(CURVE_GRID, CURVE_GRID[1])  # at a recall of 0 a curve ends at 1, whatever its precision
    indices = np.searchsorted(x[::-1], recalls)  # recall falls along the curve; precision is a step up to each recall
    return y[::-1][indices]


def _mark_threshold(
    axes: Axes, kind: str, targets: np.ndarray, decisions: np.ndarray, threshold: float | list[float] | None
) -> None:
    """Mark the threshold on the curve of `binary`, unless precision is undefined there."""
    recall = decisions[targets == 1].mean()
    if kind == "roc":
        x, y = decisions[targets == 0].mean(), recall
    elif decisions.any():
        x, y = recall, targets[decisions == 1].mean()
    else:
        return
    label = f"threshold {0.5 if threshold is None else threshold:.3f}"
    axes.plot(x, y, "o", color="tab:red", markersize=8, clip_on=False, zorder=3, label=label)


def _decorate_axes(axes: Axes, kind: str, share: float) -> None:
    """Draw labels and the line of chance; `share` of the samples are positive."""
    if kind == "roc":
        axes.plot([0, 1], [0, 1], label="chance", **DOTTED)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC (area)")
    else:
        axes.axhline(share, label=f"positive samples ({share:.3f})", **DOTTED)
        axes.set(xlabel="recall", ylabel="precision", title="Precision and recall (average precision)")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)


def _plot_reliability(task: str, outputs: np.ndarray, targets: np.ndarray, calibration: Calibration) -> Figure:
    """Plot how often predictions of some probability are right, before and after the temperature.

    The probability is that of the positive label (`binary`) or of the likeliest one (`multiclass`).
    """
    figure = Figure(figsize=(6, 7), layout="constrained")
    curves, histogram = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    curves.plot([0, 1], [0, 1], label="perfect", **DOTTED)
    bins = np.linspace(0, 1, NUM_BINS + 1)
    for temperature, color, name in ((1.0, "tab:gray", "before"), (calibration.temperature, "tab:blue", "after")):
        probs = Calibration(temperature).probabilities(task, outputs)
        predicted, observed = probs[:, 1], targets
        if task == "multiclass":
            predicted, observed = probs.max(axis=1), probs.argmax(axis=1) == targets
        share, mean = calibration_curve(observed, predicted, n_bins=NUM_BINS, pos_label=1)
        curves.plot(mean, share, "o-", color=color, markersize=5, label=f"{name}: temperature {temperature:.2f}")
        histogram.hist(predicted, bins=bins, color=color, histtype="step", linewidth=1.5)
    subject = "of the positive label" if task == "binary" else "of the likeliest label"
    curves.set(ylabel="share that is right", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02), title=f"Calibration {subject}")
    histogram.set(xlabel=f"probability {subject}", ylabel="samples")
    histogram.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    curves.legend(loc="upper left", fontsize=9)
    for axes in (curves, histogram):
        axes.grid(alpha=0.3)
    return figure


def _plot_confusion(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Plot counts `(C, C)`, and their shares of a row."""
    size = float(np.clip(0.36 * len(labels), 3.2, 12))
    label_margin = 0.08 * max(len(_shorten(label)) for label in labels)
    figure = Figure(figsize=(2 * (size + label_margin + 0.7), size + label_margin + 1), layout="compressed")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ticks = range(0, len(labels), -(-len(labels) // MAX_TICK_LABELS))
    names = [_shorten(labels[tick]) for tick in ticks]
    fontsize = 9 if len(labels) <= 20 else 7
    panels = (counts, "samples"), (shares, "share of the true label")
    for axes, (values, title) in zip(figure.subplots(1, 2), panels, strict=True):
        top = max(float(values.max()), 1.0)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=top)
        axes.set_xticks(ticks, names, rotation=90 if label_margin > size / len(labels) else 0, fontsize=fontsize)
        axes.set_yticks(ticks, names, fontsize=fontsize)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        if len(labels) <= MAX_NUMBERS:
            _annotate_cells(axes, values, top)
    return figure


def _annotate_cells(axes: Axes, values: np.ndarray, top: float) -> None:
    """Write numbers into the cells of a matrix; a large one gets no zeros, so that the others stand out."""
    fontsize = 10 if len(values) <= 8 else 9 if len(values) <= 15 else 7
    for (row, column), value in np.ndenumerate(values):
        if value or len(values) <= 8:
            text = f"{value:d}" if values.dtype.kind == "i" else f"{value:.2f}".replace("0.", ".", len(values) > 8)
            color = "white" if value > 0.6 * top else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=color)


def _plot_predictions(predicted: np.ndarray, targets: np.ndarray) -> Figure:
    """Plot predicted over true values, and residuals: `(N,), (N,)`."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    over, residuals = figure.subplots(1, 2)
    style = {"s": 12, "alpha": min(1.0, max(0.1, 300 / len(targets))), "linewidths": 0, "rasterized": True}
    over.scatter(targets, predicted, **style)
    ends = [min(targets.min(), predicted.min()), max(targets.max(), predicted.max())]
    over.plot(ends, ends, label="predicted = true", **DOTTED)
    over.set(xlabel="true", ylabel="predicted", title="Predictions")
    over.set_aspect("equal", adjustable="datalim")
    over.legend(loc="upper left", fontsize=9)
    residuals.scatter(predicted, predicted - targets, **style)
    residuals.axhline(0, **DOTTED)
    bias = float((predicted - targets).mean())
    residuals.axhline(bias, color="tab:red", linewidth=1, label=f"mean {bias:.3g}")
    residuals.set(xlabel="predicted", ylabel="predicted - true", title="Residuals")
    residuals.legend(loc="upper left", fontsize=9)
    for axes in (over, residuals):
        axes.grid(alpha=0.3)
    return figure


def _plot_scores(predicted: np.ndarray, relevance: np.ndarray, groups: np.ndarray) -> Figure:
    """Plot scores minus their group's mean, as only samples of a group are compared, by relevance: three `(N,)`."""
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
    """Return a label's name as plain text for matplotlib, without its middle where it is long."""
    name = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return name.replace("$", r"\$")  # an unescaped one begins a formula
