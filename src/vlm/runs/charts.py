"""Curves as inline SVG, for pages without scripts: light and dark, linear and logarithmic.

Colours are variables of the page, see `STYLE`; a figure holds both scales, and a box next to its title switches them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from vlm.config.shown import printable

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 80, 12, 12, 40
"""The size of a chart and the margins around its axes, in SVG units."""
MAX_POINTS = 800
"""Maximum number of drawn points of a curve; of more, the lowest and the highest of each stretch are drawn."""
NUM_COLOURS = 8
DASHES = ("", "6 3", "2 3")
"""Patterns of lines, used if there are more lines than colours."""

STYLE = """\
:root{--c0:#0b62c4;--c1:#c2410c;--c2:#187a3c;--c3:#7c3aed;--c4:#be185d;--c5:#0e7490;--c6:#946200;--c7:#60646c}
@media(prefers-color-scheme:dark){:root{--c0:#70b0ff;--c1:#ff9a5c;--c2:#5fce8a;--c3:#c4a5ff;--c4:#ff8fc7;--c5:#5ed3e8;
--c6:#e8c15a;--c7:#a8adb5}}
figure{margin:1.2rem 0}figcaption{display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:baseline;font-weight:600}
figcaption label{font-weight:400;color:var(--muted);font-size:.85rem;margin-left:auto;cursor:pointer}
.chart{width:100%;height:auto;display:block}.chart text{fill:var(--muted);font:12px system-ui,sans-serif}
.chart .grid{stroke:var(--line);stroke-width:1}.chart .interval{stroke-width:2;opacity:.5}
.chart polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;font-size:.85rem;color:var(--muted);padding:0;margin:.2rem 0 0;
list-style:none}.legend svg{width:22px;height:10px;margin-right:.35rem;vertical-align:middle}
figure:has(.scale:checked) .linear,figure:not(:has(.scale:checked)) .log{display:none}
"""
"""The style of pages with charts, in addition to that of all pages."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        points: its points.
        marked: whether its points are drawn too, for example those of a few evaluations.
        half_widths: x of a point -> half the width of its interval, which is drawn if `marked` is set.
    """

    name: str
    points: Sequence[Point]
    marked: bool = False
    half_widths: Mapping[int, float] = field(default_factory=dict)

    def interval(self, point: Point) -> Point:
        """Return the ends of the interval of a point; the point itself where it has none."""
        width = self.half_widths.get(int(point[0]), 0.0) if self.marked else 0.0
        return point[1] - width, point[1] + width


def draw_figure(
    title: str,
    curves: Sequence[Curve],
    *,
    x_title: str = "step",
    from_zero: bool = False,
    log_scale: bool = True,
    note: str = "",
) -> str:
    """Return a figure with its curves and a legend, as HTML; empty if no curve has a point.

    Args:
        title: plain text above it.
        curves: the curves; those without points are left out.
        x_title: plain text below the horizontal axis.
        from_zero: whether the linear scale begins at 0.
        log_scale: whether it can be switched to a logarithmic scale, if all values are above 0.
        note: plain text below the legend.
    """
    drawn = [replace(curve, points=_thin(curve.points)) for curve in _merge_equal(curves) if curve.points]
    if not drawn:
        return ""
    label = f"{title}: {', '.join(curve.name for curve in drawn)}"
    charts = _draw_chart(drawn, x_title, label, "linear", _linear_scale(drawn, from_zero=from_zero))
    switch = ""
    if log_scale and all(curve.interval(point)[0] > 0 for curve in drawn for point in curve.points):
        charts += _draw_chart(drawn, x_title, label, "log", _log_scale(drawn))
        switch = '<label><input type="checkbox" class="scale"> log scale</label>'
    legend = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true"><line x1="0" y1="5" x2="22" y2="5" stroke-width="2.5" '
        f"{_stroke(number)}/></svg>{_text(curve.name)}</li>"
        for number, curve in enumerate(drawn)
    )
    below = f"<small>{_text(note)}</small>" if note else ""
    return (
        f"<figure><figcaption><span>{_text(title)}</span>{switch}</figcaption>{charts}"
        f'<ul class="legend">{legend}</ul>{below}</figure>'
    )


def _merge_equal(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves; those that coincide are merged into one with all their names."""
    merged: dict[tuple[Point, ...], Curve] = {}
    for curve in curves:
        points = tuple(curve.points)
        name = f"{merged[points].name}, {curve.name}" if points in merged else curve.name
        merged[points] = replace(curve, name=name, points=points)
    return list(merged.values())


def _text(text: str) -> str:
    return escape(printable(text))


def _stroke(number: int) -> str:
    dash = DASHES[number // NUM_COLOURS % len(DASHES)]
    return f'stroke="var(--c{number % NUM_COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")


@dataclass(frozen=True)
class _Scale:
    """Where values are on the vertical axis: `place` gives 0 at its lower end and 1 at its upper one."""

    place: Callable[[float], float]
    ticks: Sequence[float]


def _linear_scale(curves: Sequence[Curve], *, from_zero: bool) -> _Scale:
    values = [end for curve in curves for point in curve.points for end in curve.interval(point)]
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = (low if from_zero and low == 0 else low - pad), high + pad
    return _Scale(lambda y: (y - low) / (high - low), nice_ticks(low, high))


def _log_scale(curves: Sequence[Curve]) -> _Scale:
    logs = [math.log10(end) for curve in curves for point in curve.points for end in curve.interval(point)]
    low, high = min(logs), max(logs)
    pad = 0.05 * (high - low) or 0.1
    low, high = low - pad, high + pad
    decades = range(math.ceil(low), math.floor(high) + 1)
    factors = (1,) if len(decades) > 2 else (1, 2, 5)
    ticks = [f * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for f in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high][: 4 * len(DASHES)]
    return _Scale(lambda y: (math.log10(y) - low) / (high - low), ticks or [10 ** ((low + high) / 2)])


def nice_ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Return about `number` round numbers within a range."""
    raw = (high - low) / number
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.8)
    return [round(place * step, 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def show_tick(value: float) -> str:
    """Return a number of an axis in its shortest form."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _draw_chart(curves: Sequence[Curve], x_title: str, label: str, kind: str, scale: _Scale) -> str:
    first = min(curve.points[0][0] for curve in curves)
    last = max(curve.points[-1][0] for curve in curves)
    first, last = (first, last) if last > first else (first - 0.5, last + 0.5)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(x: float) -> float:
        """Return where a step is in the chart, in pixels from the left."""
        return LEFT + inner_width * (x - first) / (last - first)

    def y_of(y: float) -> float:
        """Return where a value is in the chart, in pixels from the top."""
        return TOP + inner_height * (1 - scale.place(y))

    parts = [f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(label)}">']
    for tick in scale.ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{show_tick(tick)}</text>')
    whole = all(float(x).is_integer() for curve in curves for x, _ in curve.points)
    for tick in nice_ticks(first, last, 6):
        if whole and not float(tick).is_integer():
            continue
        parts.append(f'<text x="{x_of(tick):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{show_tick(tick)}</text>')
    parts.append(f'<text x="0" y="{HEIGHT - 12}">{_text(x_title)}</text>')
    for number, curve in enumerate(curves):
        places = [(x_of(x), y_of(y)) for x, y in curve.points]
        if len(places) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" {_stroke(number)}/>')
        if curve.marked or len(places) == 1:
            dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
            parts.append(f'<g fill="var(--c{number % NUM_COLOURS})">{"".join(dots)}</g>')
        ends = [(x_of(point[0]), *map(y_of, curve.interval(point))) for point in curve.points if curve.half_widths]
        bars = (
            f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>' for x, low, high in ends if low > high
        )
        parts.append(f'<g class="interval" stroke="var(--c{number % NUM_COLOURS})">{"".join(bars)}</g>' if ends else "")
    return "".join(parts) + "</svg>"


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return the points in the order of their steps; of many, the lowest and highest of each stretch, and the last."""
    points = sorted(points)
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
