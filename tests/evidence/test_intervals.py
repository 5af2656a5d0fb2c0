"""Intervals hold what they promise, and are never narrower than items of one run allow."""

from __future__ import annotations

import numpy as np
import pytest
from evidence.verdicts.intervals import design_effect, mean, share


def test_few_items_say_little_and_all_right_is_not_certain():
    assert share([[True] * 10, [True] * 10]).low == pytest.approx(0.025 ** (1 / 20))
    assert share([[True], [True], [True]]).low < 0.3
    assert share([[False] * 10]).high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert str(share([])) == str(share([[]])) == str(mean([])) == "-"
    one, two = mean([[0.8]]), mean([[0.8], [0.9]])
    assert (one.value, one.low, one.high) == (0.8, 0, 1)
    assert (two.low < 0.3, two.high) == (True, 1)


def test_items_of_one_run_that_agree_count_as_one():
    same = [[True] * 20, [False] * 20, [True] * 20, [False] * 20]
    assert design_effect(same) == pytest.approx(20)
    assert share(same).high - share(same).low > 0.8
    mixed = [[True, False] * 10] * 4
    assert design_effect(mixed) == 1
    assert share(mixed).high - share(mixed).low < 0.25


def test_a_mean_covers_the_truth_as_often_as_it_says():
    """Runs differ with standard deviation 0.05, items with 0.1; the truth is 0.5."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):
        groups = [list(rng.normal(rng.normal(0.5, 0.05), 0.1, size=12)) for _ in range(10)]
        found = mean(groups)
        held += found.low <= 0.5 <= found.high
    assert held >= 52  # 57 expected
