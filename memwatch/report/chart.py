"""Charts as inline SVG: lines over optimizer steps, on a plain or a logarithmic axis. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 46, 150, 12, 26  # margins, in the chart's own units
LABEL = 13  # height of a line of text
MOST_LABELS = 12  # beside the lines of one chart
FACTORS = (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 20, 50, 100)  # ticks of a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        points: ``(step, value)``, steps rising; values that are not finite are left out.
        label: at its right end, and what is said of it when it is pointed at. style: CSS classes.
        key: ``data-probe`` of the element; ``None`` for none.
    """

    points: Sequence[tuple[float, float]]
    label: str
    style: str = ""
    key: int | None = None


@dataclass(frozen=True)
class Mark:
    """A sign at a place: ``alert``, ``suspicion`` or ``proof`` (see ``SHAPES``), and what it says."""

    step: float
    value: float
    kind: str
    says: str


SHAPES = {  # by kind: a path around the origin; their forms differ, so that nobody needs their colours
    "alert": "M0-7L7 5H-7Z",
    "suspicion": "M-5 0L0-5L5 0L0 5Z",
    "proof": "M-5-5H5V5H-5Z",
}


@dataclass(frozen=True)
class Axes:
    """From numbers to places.

    Attributes:
        steps, values: the smallest and largest that are shown.
        width, height: of the whole chart. right: margin for the names at the ends of the lines.
        is_log: whether the value axis is logarithmic.
    """

    steps: tuple[float, float]
    values: tuple[float, float]
    width: int = 960
    height: int = 300
    right: int = RIGHT
    is_log: bool = False

    def x(self, step: float) -> float:
        first, last = self.steps
        share = (step - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (self.width - LEFT - self.right), 1)

    def y(self, value: float) -> float:
        low, high = self.values
        value = min(max(value, low), high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Points of a polyline."""
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in points if math.isfinite(value))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in ``[low, high]``, about ``count`` of them.

    >>> ticks(0, 200)
    [0, 50, 100, 150, 200]
    """
    if high <= low:
        return [low]
    rough = (high - low) / max(1, count - 1)
    power = 10 ** math.floor(math.log10(rough))
    unit = next(u * power for u in (1, 2, 2.5, 5, 10) if u * power >= 0.8 * rough)
    first = math.ceil(low / unit - 1e-9)
    return [round(i * unit, 12) for i in range(first, math.floor(high / unit + 1e-9) + 1)]


def frame(axes: Axes, unit: str = "") -> Markup:
    """Grid and numbers of both axes. ``unit``: behind every number of the value axis."""
    low, high = axes.values
    numbers = [v for v in FACTORS if low <= v <= high] if axes.is_log else ticks(low, high)
    right, bottom = axes.width - axes.right, axes.height - BOTTOM
    parts = []
    for value in numbers:
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.6g}{unit}</text>')
    for step in ticks(*axes.steps):
        parts.append(f'<text class="tick" x="{axes.x(step)}" y="{bottom + 17}" text-anchor="middle">{step:.10g}</text>')
    return Markup("".join(parts))


def line(axes: Axes, one: Line) -> Markup:
    """A curve that can be pointed at and reached by keyboard; a single point is a dot."""
    points = [(step, value) for step, value in one.points if math.isfinite(value)]
    if not points:
        return Markup("")
    key = "" if one.key is None else f' data-probe="{one.key}" tabindex="0"'
    ends = axes.path([points[0]]).split(",")
    body = Markup(f'<polyline points="{axes.path(points)}"/>')
    if len(points) == 1:
        body = Markup(f'<circle cx="{ends[0]}" cy="{ends[1]}" r="3"/>')
    return Markup('<g class="line {}"{}><title>{}</title>{}</g>').format(one.style, Markup(key), one.label, body)


def labels(axes: Axes, lines: Sequence[Line]) -> Markup:
    """The first few lines' names at their right ends, moved apart where they would overlap."""
    room = int((axes.height - TOP - BOTTOM) // LABEL)
    ended = [one for one in lines if one.points][: min(room, MOST_LABELS)]
    ended.sort(key=lambda one: axes.y(one.points[-1][1]))
    heights = apart([axes.y(one.points[-1][1]) for one in ended], TOP, axes.height - BOTTOM)
    texts, x = [], axes.width - axes.right + 8
    for y, one in zip(heights, ended, strict=True):
        name = one.label if len(one.label) <= 20 else f"{one.label[:11]}…{one.label[-8:]}"
        key = "" if one.key is None else Markup(f' data-probe="{one.key}"')
        texts.append(Markup('<text class="name {}"{} x="{}" y="{}">{}</text>').format(one.style, key, x, y + 4, name))
    return Markup("").join(texts)


def apart(heights: Sequence[float], highest: float, lowest: float, gap: float = LABEL) -> list[float]:
    """Rising heights moved so that lines of text do not overlap: down first, and what runs out moves up again.

    Args:
        gap: from one line to the next, in the unit of the heights.

    >>> apart([10, 11, 90], 0, 100)
    [10, 23, 90]
    """
    placed: list[float] = []
    for y in heights:
        placed.append(max(y, placed[-1] + gap if placed else highest))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], placed[i + 1] - gap if i + 1 < len(placed) else lowest)
    return placed


def band(axes: Axes, points: Sequence[tuple[float, float, float]]) -> Markup:
    """The area between two curves: ``(step, low, high)``."""
    if not points:
        return Markup("")
    if len(points) == 1:
        step, low, high = points[0]
        x, y = axes.x(step), axes.y(high)
        return Markup(f'<rect class="band" x="{x - 4}" y="{y}" width="8" height="{axes.y(low) - y + 1}"/>')
    over = axes.path([(step, high) for step, _, high in points])
    under = axes.path([(step, low) for step, low, _ in reversed(points)])
    return Markup(f'<polygon class="band" points="{over} {under}"/>')


def mark(axes: Axes, one: Mark) -> Markup:
    """A sign with its words."""
    place, shape = f"translate({axes.x(one.step)} {axes.y(one.value)})", SHAPES[one.kind]
    return Markup('<path class="mark {}" transform="{}" d="{}"><title>{}</title></path>').format(
        one.kind, place, shape, one.says
    )


def across(axes: Axes, value: float, text: str, style: str) -> Markup:
    """A level: a horizontal line with its name above its left end."""
    y = axes.y(value)
    rule = Markup(f'<path class="{style}" d="M{LEFT} {y}H{axes.width - axes.right}"/>')
    return rule + Markup('<text class="tick {}" x="{}" y="{}">{}</text>').format(style, LEFT + 4, y - 4, text)


def upright(axes: Axes, step: float, text: str, style: str) -> Markup:
    """A moment: a vertical line with its name beside its top."""
    x = axes.x(step)
    rule = Markup(f'<path class="{style}" d="M{x} {TOP}V{axes.height - BOTTOM}"/>')
    end, at = ("end", x - 4) if x > axes.width / 2 else ("start", x + 4)
    return rule + Markup('<text class="tick {}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        style, at, TOP + 10, end, text
    )


def svg(axes: Axes, name: str, *parts: str, style: str = "") -> Markup:
    """The whole drawing. ``name`` says what it shows, for people who hear the page."""
    start, end = axes.x(axes.steps[0]), axes.x(axes.steps[1])
    return Markup(
        f'<svg class="chart {escape(style)}" viewBox="0 0 {axes.width} {axes.height}" role="img"'
        f' aria-label="{escape(name)}" data-x="{start},{end}" data-steps="{axes.steps[0]},{axes.steps[1]}">'
        f"{''.join(parts)}</svg>"
    )
