"""Bands: dots where the factors are, a grey band where the controls are, labels that do not hide one another."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import ImageColor
from support.observations import controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import judge_event
from memwatch.report.chart import apart
from memwatch.report.heatmap import height_of
from memwatch.report.report import Report
from memwatch.report.severity_axis import DOT, LEFT, LINE, RIGHT, SHADE, band, swarm
from memwatch.report.title_bar import VERDICT_COLOURS

WIDTH, HEIGHT = 400, 600


def report(*observations):
    config = load_config(None)
    calibrated = any(o.probe.is_control for o in observations)
    return Report(100, config, judge_event(observations, {}, 100, config), calibrated, 1.0, 0, None)


def rows_of(picture, colour):
    """First and last row of the plot that hold a colour."""
    inside = np.asarray(picture)[LINE:, LEFT:RIGHT]
    rows = np.nonzero((inside == ImageColor.getrgb(colour)).all(-1).any(1))[0]
    return (int(rows.min()), int(rows.max())) if len(rows) else None


def test_dots_and_the_controls_lie_at_their_factors():
    given = report(seen("a", 4.0), *controls(20, 1.2, spread=0.1))
    (found,), most = given.findings, max(given.controls.values())
    picture = band(given, {"a"}, WIDTH, HEIGHT)
    top, bottom = rows_of(picture, VERDICT_COLOURS[found.verdict])
    dot, shade = (height_of(f, HEIGHT - LINE, given.config.heatmap.max_factor) for f in (found.severity, most))
    assert (top + bottom) / 2 == pytest.approx(dot, abs=1.5)
    assert bottom - top == pytest.approx(2 * DOT, abs=2)
    assert rows_of(picture, SHADE)[0] == pytest.approx(shade, abs=2)


def test_without_controls_there_is_no_band_and_no_alert_level():
    picture = band(report(seen("a", 4.0)), {"a"}, WIDTH, HEIGHT)
    assert rows_of(picture, SHADE) is None
    assert rows_of(picture, VERDICT_COLOURS[Verdict.SUSPICIOUS]) is not None


def test_what_was_not_compared_has_no_dot():
    given = report(seen("a", baseline=None), seen("b", now=measured(math.nan)), *controls(20, 1.0))
    assert {f.verdict for f in given.findings} == {Verdict.INCONCLUSIVE}
    assert rows_of(band(given, {"a", "b"}, WIDTH, HEIGHT), VERDICT_COLOURS[Verdict.INCONCLUSIVE]) is None


def test_only_the_named_probes_have_a_label():
    given = report(seen("a", 4.0), *controls(20, 1.0))
    named, unnamed = (np.asarray(band(given, names, WIDTH, HEIGHT)) for names in ({"a"}, set()))
    assert not np.array_equal(named[:, RIGHT + 1 :], unnamed[:, RIGHT + 1 :])


def test_dots_at_one_height_lie_side_by_side():
    spots = swarm([100.0, 100.0, 300.0, 101.0])
    assert [y for _, y in spots] == [100.0, 100.0, 300.0, 101.0]
    assert spots[0][0] == spots[2][0]
    for one, other in itertools.combinations(spots, 2):
        assert math.dist(one, other) >= 2 * DOT
    assert all(LEFT + DOT <= x <= RIGHT - DOT for x, _ in swarm([100.0] * 50))


def test_labels_are_moved_apart_and_stay_inside():
    moved = apart([5.0, 100.0, 101.0, 102.0, 590.0, 595.0], LINE / 2, 600 - LINE / 2, LINE)
    assert all(b - a >= LINE for a, b in itertools.pairwise(moved))
    assert moved[0] >= LINE / 2
    assert moved[-1] <= 600 - LINE / 2
    assert moved[1] == 100.0
    assert apart([], LINE / 2, 600 - LINE / 2, LINE) == []
