"""Plots of runs: one that logged a single time has a point, and the axis says what the loss is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.train.monitor.plots import draw_loss


def coloured_share(file: Path) -> float:
    """The share of the pixels that are neither white nor grey."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return float((pixels.max(-1) - pixels.min(-1) > 40).mean())


def test_a_single_log_is_a_point(tmp_path: Path):
    draw_loss([], tmp_path / "empty.png")
    draw_loss([{"step": 3, "loss": 1.5}], tmp_path / "one.png")
    assert coloured_share(tmp_path / "empty.png") == 0
    assert coloured_share(tmp_path / "one.png") > 0


def test_the_axis_says_what_the_loss_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **named: figures.append(figure))
    draw_loss([{"step": 3, "loss": 1.5}, {"step": 4, "loss": 1.0}], tmp_path / "x.png", "loss of the prediction heads")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "loss of the prediction heads"
    assert all(tick == round(tick) for tick in axes.get_xticks())
