"""Calibration: p-values against held-out controls, by hand and under the null."""

from __future__ import annotations

import math
import random

import pytest

from memwatch.judge.calibration import Null, expected_false_alarms


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 1.0),
        (0.5, 1.0),
        (1.0, 0.8),
        (2.0, 0.8),
        (2.1, 0.4),
        (3.0, 0.4),
        (3.1, 0.2),
        (math.inf, 0.2),
        (-math.inf, 1.0),
    ],
)
def test_p_value_by_hand(x, expected):
    """Controls 0.5, 2, 2, 3: ties count as at least as large."""
    assert Null.of([2.0, 0.5, 3.0, 2.0]).p_value(x) == pytest.approx(expected)


def test_smallest_p():
    assert Null.of([1.0] * 19).smallest_p == 0.05
    assert Null.of([1.0] * 19).p_value(2.0) == 0.05
    assert Null.of([]).smallest_p == 1.0


def test_no_controls_no_p_value():
    assert Null.of([]).p_value(3.0) is None


def test_controls_that_are_not_finite_do_not_count():
    null = Null.of([1.0, math.nan, math.inf, -math.inf, 0.0])
    assert null.statistics == (0.0, 1.0)
    assert null.p_value(0.5) == pytest.approx(2 / 3)


def test_p_values_are_valid_under_the_null():
    """Probe and controls from one law: P(p <= a) <= a, and close to it where a is a multiple of 1 / (1 + N)."""
    rng = random.Random(0)
    found = [Null.of(rng.gauss(0, 1) for _ in range(19)).p_value(rng.gauss(0, 1)) for _ in range(4000)]
    for level in (0.05, 0.1, 0.25, 0.5):
        share = sum(p <= level for p in found) / len(found)
        assert share == pytest.approx(level, abs=4 * (level * (1 - level) / len(found)) ** 0.5)


def test_expected_false_alarms():
    assert expected_false_alarms(20, 0.05) == pytest.approx(1.0)
    assert expected_false_alarms(0, 0.05) == 0
