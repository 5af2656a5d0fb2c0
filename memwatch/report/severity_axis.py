"""Band: every probe of an event on one scale, beside what the controls show."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from statistics import median

from PIL import Image, ImageDraw

from memwatch.report.chart import apart
from memwatch.report.heatmap import BAR, colour_bar, height_of
from memwatch.report.report import Report
from memwatch.report.title_bar import INK, PAPER, QUIET, VERDICT_COLOURS, fitting, font_of

LEFT, RIGHT = BAR, BAR + 96  # pixels: where the dots lie
LABELS = RIGHT + 30  # pixels: where the labels begin
DOT = 9  # pixels, radius
LETTERS, LINE = 24, 30  # pixels: size of the labels, and from one to the next
SHADE = "#D4D4D4"  # of the controls

TITLE = "times less freedom"

Label = tuple[float, float, str]  # where what it names ends, (y, x) in pixels, and its name


def band(report: Report, named: Collection[str], width: int, height: int) -> Image.Image:
    """The factors of all probes as dots in the colours of their verdicts, on the heatmaps' own scale.

    The shaded band reaches from the least control to the largest, with their median as a line. A probe can be called
    memorized from the dashed line on.

    Args:
        named: probes whose dots get a label.
        width, height: pixels.
    """
    picture, top = Image.new("RGB", (width, height), PAPER), 6.0
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), TITLE, INK, font_of(LETTERS))
    picture.paste(colour_bar(height - LINE, top, LETTERS), (0, LINE))

    def level(factor: float) -> float:
        return LINE + height_of(factor, height - LINE, top)

    labels = draw_controls(draw, list(report.controls.values()), report.config.alerts.min_severity, level)
    probes = [f for f in report.findings if f.evidence.finite and f.evidence.compared]
    for f, (x, y) in zip(probes, swarm([level(f.severity) for f in probes]), strict=True):
        draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), VERDICT_COLOURS[f.verdict], PAPER)
        if f.name in named:
            labels.append((y, x + DOT, f"{f.severity:.1f}x {f.name}"))
    write(draw, labels, width, height)
    return picture


def draw_controls(
    draw: ImageDraw.ImageDraw, controls: Sequence[float], alert_level: float, level: Callable[[float], float]
) -> list[Label]:
    """The band, its median and the alert level; nothing without controls.

    Args:
        controls: their factors.
        level: the height of a factor, pixels.
    """
    if not controls:
        return []
    most, middle, alert = level(max(controls)), level(median(controls)), level(alert_level)
    draw.rectangle((LEFT, most - 1, RIGHT, level(min(controls)) + 1), SHADE)
    draw.line((LEFT, middle, RIGHT, middle), QUIET, 2)
    for x in range(LEFT, RIGHT, 12):
        draw.line((x, alert, x + 6, alert), INK, 3)
    words = f"{len(controls)} control{'s' if len(controls) != 1 else ''}, up to {max(controls):.1f}x"
    return [(most, RIGHT, words), (alert, RIGHT, f"alert level {alert_level:g}x")]


def swarm(heights: Sequence[float]) -> list[tuple[float, float]]:
    """Centres of dots at these heights, side by side where they would hide one another; in rows that are full, on top.

    Returns:
        ``(x, y)`` in pixels, in the order of ``heights``.
    """
    columns = [LEFT + DOT + 1 + i * (2 * DOT + 1) for i in range((RIGHT - LEFT) // (2 * DOT + 1))]
    lowest = [-math.inf] * len(columns)
    found = {}
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        free = next((c for c, y in enumerate(lowest) if heights[i] - y >= 2 * DOT), i % len(columns))
        lowest[free] = heights[i]
        found[i] = (columns[free], heights[i])
    return [found[i] for i in range(len(heights))]


def write(draw: ImageDraw.ImageDraw, labels: Sequence[Label], width: int, height: int) -> None:
    """Labels beside what they name, moved apart where they are too close, each with a line to it."""
    ordered = sorted(labels)
    moved = apart([y for y, _, _ in ordered], LINE / 2, height - LINE / 2, LINE)
    for (y, x, text), written in zip(ordered, moved, strict=True):
        draw.line((x + 2, y, RIGHT + 2, y, LABELS - 6, written), QUIET, 1)
        short, font = fitting(text, width - LABELS, LETTERS)
        draw.text((LABELS, written), short, INK, font, anchor="lm")
