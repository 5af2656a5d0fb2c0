"""Calibration: profiles, p-values and the budget of a run, by hand, by slow twins and under the null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage, stats

from memwatch.config import ConfigError, RegionsConfig
from memwatch.judge.statistic import (
    NUM_SIZES,
    RESOLUTION,
    Null,
    largest_p,
    share_of_budget,
    size_index,
    sizes_of,
    top_means,
    upper_bound,
)
from memwatch.measure.probes import MIN_CONTROLS


def profiles(*rows: list[float] | float) -> Null:
    """One control per row; a single number stands for every size."""
    return Null.of([np.broadcast_to(np.asarray(row, dtype=float), NUM_SIZES) for row in rows])


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "sizes"),
    [
        (1024, (1024, 512, 256, 128, 64, 32, 16)),
        (16, (16, 8, 4, 2, 1, 1, 1)),
        (48 * 64, (3072, 1536, 768, 384, 192, 96, 48)),
        (1, (1,) * 7),
    ],
)
def test_sizes_are_halves_of_the_map(pixels, sizes):
    assert sizes_of(pixels) == sizes


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (3, 5), (16, 12)])
def test_top_means_equal_a_slow_twin(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = top_means(values)
    for mean, size in zip(found, sizes_of(values.size), strict=True):
        pixels = sorted((float(v) for v in values.flatten()), reverse=True)
        assert mean == pytest.approx(sum(pixels[:size]) / size)
    assert (np.diff(found) >= 0).all()  # rising, as sizes fall
    assert found[0] == pytest.approx(values.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("pixels", "index"), [(256, 0), (255, 1), (128, 1), (127, 2), (64, 2), (8, 5), (7, 6), (4, 6), (3, 6), (1, 6)]
)
def test_a_region_is_compared_at_the_next_smaller_size(pixels, index):
    assert size_index(pixels, of=256) == index


def test_no_connected_region_can_beat_the_profile():
    """Whatever is chosen, wherever it lies: the mean of k pixels is at most that of the k' <= k largest."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = ndimage.uniform_filter(rng.standard_normal((16, 16)), rng.integers(1, 5))
        labels, count = ndimage.label(values >= np.quantile(values, rng.uniform(0, 0.95)))
        inside = labels == rng.integers(1, count + 1)
        if inside.sum() >= sizes_of(256)[-1]:
            assert values[inside].mean() <= top_means(values)[size_index(int(inside.sum()), 256)] + 1e-12


def test_no_region_is_smaller_than_the_smallest_size():
    """Fewer pixels than the controls are asked about would have an advantage."""
    least = RegionsConfig().min_area
    with pytest.raises(ConfigError, match="min_area"):
        RegionsConfig(min_area=least * 0.99)
    for pixels in range(1, 5000):
        assert math.ceil(least * pixels) >= sizes_of(pixels)[-1]


# --- p-values ---------------------------------------------------------------------------------------------------------


def test_excess_and_p_value_by_hand():
    """Twelve controls, half of them 1, half of them 3: mean 2, standard deviation sqrt(12/11)."""
    null = profiles(*[1.0, 3.0] * 6)
    predictive = math.sqrt(12 / 11) * math.sqrt(13 / 12)
    assert null.z_score(2.0, 3) == 0
    assert null.z_score(6.0, 3) == pytest.approx(4 / predictive)
    density = stats.t(11)
    assert null.p_value(4 / predictive) == pytest.approx(7 * (1 - density.cdf(4 / predictive)))
    assert null.p_value(1.0) == 1.0  # seven sizes are paid for, and no chance is above 1
    assert null.p_value(60.0) < 1e-13  # falls below 1 / 13, the smallest rank p-value


def test_each_size_has_its_own_controls():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(12, NUM_SIZES)) * np.arange(1, 8) + np.arange(7)
    null = Null.of(list(rows))
    for size in range(NUM_SIZES):
        mean, std = rows[:, size].mean(), rows[:, size].std(ddof=1)
        assert null.z_score(5.0, size) == pytest.approx((5.0 - mean) / (std * math.sqrt(1 + 1 / 12)))
        assert null.rank_p(mean, size) == (1 + sum(value >= mean for value in rows[:, size])) / 13


def test_p_values_are_valid_under_a_gaussian_null():
    """One control more, compared at every size: P(p <= a) <= a; at one single size P(7 p <= a) is a."""
    rng, runs, n = np.random.default_rng(3), 3000, 15
    best, single = np.empty(runs), np.empty(runs)
    for i in range(runs):
        x = math.sqrt(0.7) * rng.standard_normal((n + 1, 1)) + math.sqrt(0.3) * rng.standard_normal((n + 1, NUM_SIZES))
        null = Null.of(list(x[1:]))
        z_score = [null.z_score(value, size) for size, value in enumerate(x[0])]
        best[i], single[i] = null.p_value(max(z_score)), stats.t.sf(z_score[2], n - 1)
    for level in (0.01, 0.05, 0.2):
        error = 4 * math.sqrt(level * (1 - level) / runs)
        assert (best <= level).mean() <= level + error
        assert (single <= level).mean() == pytest.approx(level, abs=error)
    assert (best <= 0.2).mean() > 0.05  # and not so cautious as to say nothing


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
def test_rank_p_by_hand(x, expected):
    """Controls 0.5, 2, 2, 3: ties count as at least as large."""
    assert profiles(2.0, 0.5, 3.0, 2.0).rank_p(x, 0) == pytest.approx(expected)


def test_smallest_rank_p():
    assert profiles(*[1.0] * 19).smallest_rank_p == profiles(*[1.0] * 19).rank_p(2.0, 0) == 0.05
    assert profiles().smallest_rank_p == 1.0


def test_rank_p_is_valid_under_any_null():
    """P(p <= a) is a where a is a multiple of 1 / (1 + N), also with a heavy tail."""
    rng, runs = np.random.default_rng(0), 4000
    drawn = rng.standard_cauchy((runs, 20))
    found = np.array([profiles(*x[1:]).rank_p(x[0], 0) for x in drawn])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (found <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / runs))


def test_controls_that_are_not_finite_do_not_count():
    null = profiles(1.0, math.nan, math.inf, 0.0, [0, 0, 0, 0, 0, 0, -math.inf])
    assert null.profiles[:, 0].tolist() == [1.0, 0.0]
    assert len(profiles(math.nan)) == len(profiles()) == 0


@pytest.mark.parametrize(("controls", "enough"), [(MIN_CONTROLS - 1, False), (MIN_CONTROLS, True)])
def test_a_group_is_enough_for_a_probe_and_for_each_of_its_controls_alike(controls, enough):
    null = profiles(*range(controls))
    assert null.is_enough is enough
    assert {null.without(i).is_enough for i in range(controls)} == {enough}
    assert len(null.without(0)) == controls - 1


def test_controls_that_are_all_alike_have_a_smallest_spread():
    null = profiles(*[0.25] * 12)
    assert null.z_score(0.25, 0) == 0
    assert null.z_score(0.25 + 3 * RESOLUTION, 0) == pytest.approx(3)
    assert null.p_value(null.z_score(2.25, 0)) < 1e-6


def test_a_control_is_left_out_by_its_number():
    null = profiles(1.0, 2.0, 3.0)
    assert null.without(1).profiles[:, 0].tolist() == [1.0, 3.0]
    assert len(null) == 3


# --- the budget of a run ----------------------------------------------------------------------------------------------


def test_the_shares_of_a_run_sum_to_one_and_never_rise():
    shares = [share_of_budget(event) for event in range(1, 16 * (2**12 - 1) + 1)]
    assert all(a >= b > 0 for a, b in itertools.pairwise(shares))
    assert sum(shares) == pytest.approx(1 - 0.5**12)  # twelve blocks: 1 in the limit, never more
    blocks = [sum(shares[16 * (2**i - 1) : 16 * (2 ** (i + 1) - 1)]) for i in range(12)]
    assert blocks == pytest.approx([0.5 ** (i + 1) for i in range(12)])


@pytest.mark.parametrize("num_probes", [1, 8])
@pytest.mark.parametrize("planned", [None, 5, 300])
def test_the_p_values_that_a_run_allows_sum_to_its_budget(num_probes, planned):
    """However long it is; a run that lasts twice as long as planned has half of what is left, and so on."""
    budget = {"false_alarms_per_run": 0.05, "num_probes": num_probes, "planned": planned}
    allowed = [num_probes * largest_p(event, **budget) for event in range(1, 5001)]
    assert 0.05 * 0.9 < sum(allowed) <= 0.05
    assert all(a >= b for a, b in itertools.pairwise(allowed))
    if planned is not None:
        assert sum(allowed[:planned]) == pytest.approx(0.05 / 2)


def test_what_an_event_allows_by_hand():
    assert largest_p(1, false_alarms_per_run=0.05, num_probes=8) == pytest.approx(0.05 / 32 / 8)
    assert largest_p(17, false_alarms_per_run=0.05, num_probes=8) == pytest.approx(0.05 / 128 / 8)
    assert largest_p(1, false_alarms_per_run=0.05, num_probes=8, planned=5) == pytest.approx(0.05 / 10 / 8)


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 24), (1, 24), (3, 10), (23, 24)])
@pytest.mark.parametrize("confidence", [0.95, 0.975])
def test_upper_bound_is_where_so_few_become_improbable(count, of, confidence):
    bound = upper_bound(count, of, confidence)
    assert stats.binom.cdf(count, of, bound) == pytest.approx(1 - confidence)
    exact = stats.binomtest(count, of).proportion_ci(2 * confidence - 1, method="exact").high
    assert bound == pytest.approx(exact)


def test_all_of_them_leave_everything_plausible():
    assert upper_bound(5, 5) == upper_bound(0, 0) == 1.0
