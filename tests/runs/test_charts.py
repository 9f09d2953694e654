"""Curves as SVG."""

import re
from xml.etree import ElementTree

from vlm.runs.charts import MAX_POINTS, Curve, draw_figure, nice_ticks, show_tick


def draw(*curves: Curve, **options: bool) -> str:
    """A figure, which has to be well formed."""
    figure = draw_figure("Loss <b>", curves, **options)
    ElementTree.fromstring(re.sub(r"<input[^>]*>", "", figure))
    return figure


def test_a_figure_has_both_scales_where_all_values_are_above_0():
    figure = draw(Curve("a & b", [(1, 2.0), (2, 1.0)]), Curve("c", [(2, 1.5)], marked=True))
    assert figure.count("<svg class=") == 2
    assert "a &amp; b" in figure
    assert "Loss &lt;b&gt;" in figure
    assert draw(Curve("a", [(1, -2.0), (2, 1.0)])).count("<svg class=") == 1


def test_without_points_there_is_no_figure():
    assert draw_figure("Loss", [Curve("a", [])]) == ""
    assert "polyline" not in draw(Curve("a", [(5, 1.0)]))


def test_points_lie_within_the_axes():
    figure = draw(Curve("a", [(0, 1e-12), (5, 1e12), (10, 3.0)]), Curve("b", [(3, 2.0), (4, 2.0)]))
    for line in re.findall(r'points="([^"]+)"', figure):
        places = [tuple(map(float, pair.split(","))) for pair in line.split()]
        assert all(0 <= x <= 720 and 0 <= y <= 260 for x, y in places)


def test_of_many_points_the_extremes_and_the_last_are_drawn():
    points = [(step, 100.0 if step == 7777 else 1.0 + step % 2) for step in range(20_000)]
    line = re.findall(r'points="([^"]+)"', draw(Curve("a", points)))[0].split()
    assert len(line) <= MAX_POINTS + 2
    assert min(float(pair.split(",")[1]) for pair in line) < 30  # the spike, near the upper end
    assert float(line[-1].split(",")[0]) == 708


def test_ticks_are_round():
    assert nice_ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3, 3) == [3]
    assert [show_tick(value) for value in (0, 0.0005, 1234.5, 2e6, -3.0)] == ["0", "5e-4", "1,234.5", "2e6", "-3"]


def test_curves_that_lie_on_each_other_are_one():
    figure = draw(Curve("a", [(1, 2.0), (2, 1.0)]), Curve("b", [(1, 2.0), (2, 1.0)]), Curve("c", [(1, 3.0), (2, 1.0)]))
    assert "</svg>a, b</li>" in figure
    assert figure.count("<polyline") == 4


def test_points_have_their_intervals_within_the_axes():
    figure = draw(Curve("a", [(1, 2.0), (2, 1.0)], True, {2: 0.5}), log_scale=False)
    ((x1, y1, x2, y2),) = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"/></g>', figure)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert x1 == x2 == dots[1][0]
    assert float(y2) < float(dots[1][1]) < float(y1) <= 260
    assert draw(Curve("a", [(1, 2.0), (2, 0.4)], True, {2: 0.5})).count("<svg class=") == 1, "it reaches below 0"
