"""Charts: numbers land where the axes say, and what they are called is text."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from memwatch.report.chart import (
    BOTTOM,
    LABEL,
    LEFT,
    MOST_LABELS,
    RIGHT,
    TOP,
    Axes,
    Line,
    Mark,
    across,
    apart,
    band,
    frame,
    labels,
    line,
    mark,
    svg,
    ticks,
    upright,
)

PLAIN = Axes((0, 100), (0.0, 10.0), width=LEFT + RIGHT + 100, height=TOP + BOTTOM + 100)
LOG = Axes((0, 100), (1.0, 4.0), width=LEFT + RIGHT + 100, height=TOP + BOTTOM + 100, is_log=True)


def test_axes_by_hand():
    assert [PLAIN.x(step) for step in (0, 50, 100)] == [LEFT, LEFT + 50, LEFT + 100]
    assert [PLAIN.y(value) for value in (10, 5, 0)] == [TOP, TOP + 50, TOP + 100]
    assert [LOG.y(value) for value in (4, 2, 1)] == [TOP, TOP + 50, TOP + 100]  # a factor of 2 is half of one of 4
    assert LOG.y(100) == TOP
    assert LOG.y(0.1) == TOP + 100


def test_one_step_or_one_value_lies_in_the_middle():
    alone = Axes((7, 7), (3.0, 3.0), width=LEFT + RIGHT + 100, height=TOP + BOTTOM + 100)
    assert (alone.x(7), alone.y(3)) == (LEFT + 50, TOP + 50)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (100, 5000, [1000, 2000, 3000, 4000, 5000]),
        (0.2, 0.31, [0.2, 0.225, 0.25, 0.275, 0.3]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_passes_over_what_is_not_finite_and_one_point_is_a_dot():
    drawn = line(PLAIN, Line([(0, 0.0), (50, math.nan), (100, 10.0)], "cat", "memorized", 3))
    assert f'points="{LEFT}.0,{TOP + 100}.0 {LEFT + 100}.0,{TOP}.0"' in drawn
    assert 'data-probe="3" tabindex="0"' in drawn
    assert "<circle" in line(PLAIN, Line([(50, 5.0)], "cat"))
    assert line(PLAIN, Line([(50, math.inf)], "cat")) == ""


def test_names_are_moved_apart_and_stay_inside():
    assert apart([10, 11, 90], 0, 100) == [10, 23, 90]
    assert apart([98, 99, 100], 0, 100) == [100 - 2 * LABEL, 100 - LABEL, 100]
    assert apart([], 0, 100) == []
    tall = Axes((0, 100), (0.0, 10.0), height=300)
    names = labels(tall, [Line([(0, i), (100, 5.0)], f"p{i}") for i in range(MOST_LABELS + 5)])
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"', names)]
    assert len(heights) == MOST_LABELS
    assert all(b - a == pytest.approx(LABEL) for a, b in pairwise(heights))
    assert labels(PLAIN, [Line([(0, 1.0)], "a")] * 50).count("<text") == 100 // LABEL  # as many as there is room for


def test_a_long_name_keeps_both_ends():
    assert "a-very-long…d-012345<" in labels(PLAIN, [Line([(0, 1.0)], "a-very-long-name-that-goes-on-and-012345")])


def test_the_whole_is_xml_and_names_are_escaped():
    parts = [
        frame(LOG, "x"),
        band(LOG, [(0, 1.0, 1.5), (100, 1.0, 2.0)]),
        band(LOG, [(0, 1.0, 1.5)]),
        band(LOG, []),
        line(LOG, Line([(0, 1.0), (100, 4.0)], "<script>alert(1)</script>", "memorized", 0)),
        labels(LOG, [Line([(0, 1.0), (100, 4.0)], "a & b")]),
        across(LOG, 1.5, "alert level", "level"),
        upright(LOG, 100, "stop", "stop"),
        mark(LOG, Mark(100, 4.0, "alert", "step 100: <cat>")),
    ]
    drawing = svg(LOG, 'severity of "a"', *parts)
    root = ElementTree.fromstring(drawing)
    assert root.attrib["aria-label"] == 'severity of "a"'
    assert [node.text for node in root.iter("title")] == ["<script>alert(1)</script>", "step 100: <cat>"]
    numbers = [node.text for node in root.iter("text")]
    assert {"1x", "1.5x", "2x", "4x", "alert level", "stop", "a & b"} <= set(numbers)
