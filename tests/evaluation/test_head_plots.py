"""Pictures of predictions: which are written, that they show what they should, and that odd data is survived."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from vlm.evaluation.calibration import Calibration
from vlm.evaluation.head_plots import CURVE_GRID, MAX_LEGEND, plot_head_scores
from vlm.models.head_tasks import NUM_OUTPUTS_BY_TASK

FILES = {
    "binary": ["roc", "precision_recall", "calibration", "confusion"],
    "multiclass": ["roc", "precision_recall", "calibration", "confusion"],
    "multilabel": ["roc", "precision_recall"],
    "ordinal": ["confusion"],
    "regression": ["predictions"],
    "pairwise": ["scores"],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by the names of the files they would have been written to."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.stem: self}))
    return found


def data(task: str, num_labels: int = 4, num: int = 80) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Outputs, targets and names of labels."""
    draw = np.random.default_rng(0)
    names = [f"label {number}" for number in range(num_labels)]
    targets = draw.integers(0, num_labels, num)
    if task == "binary":
        targets = (draw.random(num) < 0.3).astype(int)
        return (draw.normal(size=num) + targets)[:, None], targets, ["no", "yes"]
    if task == "multiclass":
        return draw.normal(size=(num, num_labels)) + np.eye(num_labels)[targets], targets, names
    if task == "multilabel":
        targets = (draw.random((num, num_labels)) < 0.3).astype(int)
        return draw.normal(size=targets.shape) + targets, targets, names
    if task == "ordinal":
        outputs = (targets + draw.normal(size=num))[:, None] - np.arange(num_labels - 1) - 0.5
        return outputs, targets, names
    return (targets + draw.normal(size=num))[:, None], targets.astype(float), []


def plot_task(task: str, folder: Path, calibration: Calibration | None = None, **options) -> list[Path]:
    outputs, targets, names = data(task, **options)
    groups = np.arange(len(targets)) % 5 if task == "pairwise" else None
    return plot_head_scores(task, outputs, targets, calibration or Calibration(), names, folder, groups=groups)


def legend(figure: Figure) -> list[str]:
    found = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for one in found if one for text in one.get_texts()]


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_the_files_of_each_task(task: str, tmp_path: Path):
    paths = plot_task(task, tmp_path / "new" / "folder")
    assert [path.stem for path in paths] == FILES[task]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_binary_curves_have_their_areas_and_the_threshold(figures: dict[str, Figure], tmp_path: Path):
    calibration = Calibration(1.5, 0.6)
    plot_task("binary", tmp_path, calibration)
    outputs, targets, _ = data("binary")
    assert f"yes ({roc_auc_score(targets, outputs[:, 0]):.3f})" in legend(figures["roc"])
    area = average_precision_score(targets, outputs[:, 0])
    assert f"yes ({area:.3f})" in legend(figures["precision_recall"])
    decided = outputs[:, 0] / 1.5 >= np.log(0.6 / 0.4)
    recall, wrong = decided[targets == 1].mean(), decided[targets == 0].mean()
    marks = {
        name: next(line for line in figures[name].axes[0].lines if line.get_label() == "threshold 0.600")
        for name in ("roc", "precision_recall")
    }
    assert marks["roc"].get_xydata()[0] == pytest.approx([wrong, recall])
    assert marks["precision_recall"].get_xydata()[0] == pytest.approx([recall, targets[decided].mean()])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_curve_a_label_and_their_mean(task: str, figures: dict[str, Figure], tmp_path: Path):
    plot_task(task, tmp_path, num=300)
    outputs, targets, _ = data(task, num=300)
    truth = targets if task == "multilabel" else np.eye(4)[targets]
    probs = Calibration().probabilities(task, outputs)
    for name, of in (("roc", roc_auc_score), ("precision_recall", average_precision_score)):
        areas = [of(truth[:, label], probs[:, label]) for label in range(4)]
        texts = legend(figures[name])
        assert texts[:4] == [f"label {label} ({area:.3f})" for label, area in enumerate(areas)]
        assert texts[4] == f"mean of 4 labels ({np.mean(areas):.3f})"
        mean = next(line for line in figures[name].axes[0].lines if line.get_label() == texts[4])
        height = np.asarray(mean.get_ydata())
        area = ((height[1:] + height[:-1]) / 2 * np.diff(CURVE_GRID)).sum()
        assert area == pytest.approx(np.mean(areas), abs=0.01)


def test_the_mean_does_not_begin_at_a_precision_that_no_label_has(figures: dict[str, Figure], tmp_path: Path):
    outputs, targets = np.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]), np.array([[0, 0], [1, 1], [0, 0]])
    plot_head_scores("multilabel", outputs, targets, Calibration(), ["a", "b"], tmp_path)
    mean = next(line for line in figures["precision_recall"].axes[0].lines if str(line.get_label()).startswith("mean"))
    assert np.asarray(mean.get_ydata()) == pytest.approx(0.5)


def test_a_legend_names_few_labels(figures: dict[str, Figure], tmp_path: Path):
    plot_task("multiclass", tmp_path, num_labels=MAX_LEGEND, num=400)
    assert len(legend(figures["roc"])) == MAX_LEGEND + 2
    plot_task("multiclass", tmp_path, num_labels=MAX_LEGEND + 1, num=400)
    assert len(legend(figures["roc"])) == 2
    assert len(figures["roc"].axes[0].lines) == MAX_LEGEND + 3


def test_labels_of_one_class_have_no_curves(figures: dict[str, Figure], tmp_path: Path):
    outputs, targets, names = data("multilabel")
    targets[:, 1:3] = 0
    plot_head_scores("multilabel", outputs, targets, Calibration(), names, tmp_path)
    assert [text.split(" (")[0] for text in legend(figures["roc"])[:3]] == ["label 0", "label 3", "mean of 2 labels"]
    outputs, targets, names = data("binary")
    paths = plot_head_scores("binary", outputs, np.ones_like(targets), Calibration(), names, tmp_path)
    assert [path.stem for path in paths] == ["calibration", "confusion"]


def test_reliability_before_and_after(figures: dict[str, Figure], tmp_path: Path):
    plot_task("binary", tmp_path, Calibration(2.0, 0.5))
    outputs, targets, _ = data("binary")
    assert legend(figures["calibration"]) == ["perfect", "before: temperature 1.00", "after: temperature 2.00"]
    after = figures["calibration"].axes[0].lines[2]
    probs = 1 / (1 + np.exp(-outputs[:, 0] / 2))
    bins = np.minimum((probs * 15).astype(int), 14)
    points = [(probs[bins == one].mean(), targets[bins == one].mean()) for one in np.unique(bins)]
    assert np.asarray(after.get_xydata()) == pytest.approx(np.array(points))


def test_the_confusion_matrix_is_written_out(figures: dict[str, Figure], tmp_path: Path):
    plot_task("ordinal", tmp_path)
    outputs, targets, _ = data("ordinal")
    counts = confusion_matrix(targets, (outputs > 0).sum(axis=1))
    left, right = figures["confusion"].axes
    assert [text.get_text() for text in left.texts] == [str(count) for count in counts.ravel()]
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert [text.get_text() for text in right.texts] == [f"{share:.2f}" for share in shares.ravel()]
    assert [text.get_text() for text in left.get_yticklabels()] == [f"label {number}" for number in range(4)]


def test_large_matrices_have_neither_numbers_nor_all_names(figures: dict[str, Figure], tmp_path: Path):
    plot_task("multiclass", tmp_path, num_labels=90, num=200)
    left = figures["confusion"].axes[0]
    assert not left.texts
    assert [text.get_text() for text in left.get_xticklabels()] == [f"label {number}" for number in range(0, 90, 3)]


def test_odd_names_of_labels(tmp_path: Path, figures: dict[str, Figure]):
    """Dollars do not begin a formula, long names are cut, and names may be alike."""
    outputs, targets, _ = data("ordinal")
    names = ["$a_", "b" * 60 + "c", "same", "same"]
    plot_head_scores("ordinal", outputs, targets, Calibration(), names, tmp_path)
    figures["confusion"].draw_without_rendering()
    shown = [text.get_text() for text in figures["confusion"].axes[0].get_yticklabels()]
    assert shown == [r"\$a_", "b" * 12 + "…" + "b" * 10 + "c", "same", "same"]


def test_predictions_and_residuals(figures: dict[str, Figure], tmp_path: Path):
    plot_task("regression", tmp_path)
    outputs, targets, _ = data("regression")
    over, left = (np.asarray(axes.collections[0].get_offsets()) for axes in figures["predictions"].axes)
    assert over == pytest.approx(np.stack([targets, outputs[:, 0]], axis=1))
    assert left == pytest.approx(np.stack([outputs[:, 0], outputs[:, 0] - targets], axis=1))


def test_scores_are_drawn_less_the_mean_of_their_group(figures: dict[str, Figure], tmp_path: Path):
    """Many levels of relevance are points, few are boxes."""
    given, groups = np.arange(20.0), np.arange(20) // 10
    plot_head_scores("pairwise", given[:, None], given, Calibration(), [], tmp_path, groups=groups)
    points = np.asarray(figures["scores"].axes[0].collections[0].get_offsets())
    assert points[:, 1] == pytest.approx(np.tile(np.arange(10) - 4.5, 2))
    plot_head_scores("pairwise", given[:, None], given % 3, Calibration(), [], tmp_path, groups=groups)
    ticks = [text.get_text() for text in figures["scores"].axes[0].get_xticklabels()]
    assert ticks == ["0\n(7)", "1\n(7)", "2\n(6)"]


@pytest.mark.parametrize("task", NUM_OUTPUTS_BY_TASK)
def test_one_sample_can_be_drawn(task: str, tmp_path: Path):
    outputs, targets, names = data(task)
    groups = np.zeros(1) if task == "pairwise" else None
    paths = plot_head_scores(task, outputs[:1], targets[:1], Calibration(), names, tmp_path, groups=groups)
    curves = ["roc", "precision_recall"]
    assert [path.stem for path in paths] == [name for name in FILES[task] if name not in curves]


def test_what_does_not_fit_is_refused(tmp_path: Path):
    outputs, targets, names = data("multiclass")
    with pytest.raises(ValueError, match="labels of multiclass: got 3, expected 4"):
        plot_head_scores("multiclass", outputs, targets, Calibration(), names[:3], tmp_path)
    with pytest.raises(ValueError, match="groups of pairwise: got None"):
        plot_head_scores("pairwise", outputs[:, :1], targets, Calibration(), [], tmp_path)
    assert not list(tmp_path.iterdir())
