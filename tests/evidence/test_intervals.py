"""Intervals hold what they promise, and are never narrower than items of one run allow."""

import numpy as np
import pytest
from evidence.verdicts.intervals import at_least_exact, bootstrap, design_effect, mean, median, share


def test_independent_items_give_the_exact_interval():
    rng = np.random.default_rng(0)
    groups = [rng.random(10) < 0.5 for _ in range(4)]
    k = int(sum(group.sum() for group in groups))
    found = share([list(group) for group in groups])
    assert found.value == k / 40
    assert found.count == 40
    assert found.low < k / 40 < found.high


def test_all_right_is_not_certain():
    assert share([[True] * 10, [True] * 10]).low == pytest.approx(0.025 ** (1 / 20))
    assert share([[True], [True], [True]]).low < 0.3
    assert share([[False] * 10]).high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert str(share([])) == str(share([[]])) == str(mean([])) == "-"


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


def test_few_items_say_little():
    one = mean([[0.8]])
    assert (one.value, one.low, one.high) == (0.8, 0, 1)
    two = mean([[0.8], [0.9]])
    assert two.low < 0.3
    assert two.high == 1
    same = at_least_exact(1.0, 1.0, 1.0, 10)
    assert same.low == pytest.approx(0.025 ** (1 / 10))
    assert at_least_exact(0.5, 0.1, 0.9, 1000).low == 0.1


def test_medians_and_other_statistics():
    assert median([[1.0, 2.0, 9.0], []]).value == 2
    found = bootstrap([[0.0, 0.0], [1.0, 1.0]], lambda drawn: float(np.concatenate(drawn).max()))
    assert (found.value, found.low, found.high) == (1, 0, 1)
