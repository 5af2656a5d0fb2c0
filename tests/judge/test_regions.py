"""Regions: connected places of a map above a threshold, and how strong they are on draws that did not propose them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage, stats

from memwatch.judge.regions import SMALL, SMALL_RELATIVE, box_of, components, estimate, threshold_of

MIN_FACTOR, RELATIVE = 1.1, 0.35


def test_components_by_hand():
    values = np.array([[0.0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0], [2, 0, 0, 0]])
    first, second = components(values, math.e, 0.0)  # the limit is 1; corners touch
    assert np.argwhere(first).tolist() == [[0, 1], [1, 2]]
    assert np.argwhere(second).tolist() == [[3, 0]]
    assert box_of(first, 8) == (8, 0, 24, 16)
    assert box_of(second, 1) == (0, 3, 1, 4)
    assert first.dtype == bool


def test_threshold_is_inclusive():
    values = np.array([[1.0, 0.5]])
    assert [inside.mean() for inside in components(values, math.e, 0.0)] == [0.5]
    assert [inside.mean() for inside in components(values, math.exp(0.5), 0.0)] == [1.0]
    assert list(components(values, math.exp(1.01), 0.0)) == []


def test_a_small_hill_ends_half_way_up_and_a_large_one_at_its_foot():
    """What smoothing leaves of a small square has no plateau; the rim of a large one is part of it."""
    sharp = np.zeros((16, 16))
    sharp[2:6, 2:6] = 1.0
    small = ndimage.uniform_filter(sharp, 3)
    (found,) = components(small, MIN_FACTOR, RELATIVE)
    top = np.quantile(small[small >= threshold_of(small, MIN_FACTOR, RELATIVE)], 0.98)
    assert np.array_equal(found, small >= SMALL_RELATIVE * top)
    assert found.sum() < (small >= math.log(MIN_FACTOR)).sum()
    sharp[4:14, 3:15] = 1.0
    large = ndimage.uniform_filter(sharp, 3)
    (found,) = components(large, MIN_FACTOR, RELATIVE)
    assert found.mean() > SMALL
    assert np.array_equal(found, large >= RELATIVE * np.quantile(large, 0.98))


def test_min_area_drops_small_regions():
    values = np.zeros((4, 4))
    values[0, 0], values[2:, 2:] = 100.0, 1.0
    assert [inside.sum() for inside in components(values, math.exp(0.5), 0.0, 2 / 16)] == [4]
    assert len(list(components(values, math.exp(0.5), 0.0, 1 / 16))) == 2  # exactly the smallest is kept


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0])
def test_nothing_there(value):
    assert list(components(np.full((3, 3), value), MIN_FACTOR, RELATIVE)) == []


def test_the_threshold_is_a_share_of_the_peak_but_no_trifle():
    values = np.zeros((10, 10))
    values[:, :5] = 2.0
    values[0, 0] = 50.0  # one odd pixel
    assert threshold_of(values, 1.1, 0.35) == pytest.approx(0.7)
    assert threshold_of(values, 3.0, 0.35) == pytest.approx(math.log(3))
    assert threshold_of(values, 1.1, 0.0) == pytest.approx(math.log(1.1))
    assert threshold_of(-values, 1.1, 0.35) == pytest.approx(math.log(1.1))


# --- how strong a region is -------------------------------------------------------------------------------------------


def noise(rng: np.random.Generator, draws: int, truth: np.ndarray | float = 0.0, std: float = 0.3) -> np.ndarray:
    """One map per noise draw, ``(draws, 16, 16)``: smooth noise of that standard deviation around the truth."""
    smooth = ndimage.uniform_filter(rng.standard_normal((draws, 16, 16)), (0, 3, 3))
    return truth + std * 3 * smooth  # the mean of nine


def slow_estimate(samples: np.ndarray, inside: np.ndarray) -> tuple[float, float, float]:
    """Draw by draw and pixel by pixel."""
    effects = []
    for i in range(len(samples)):
        others = np.mean([samples[j] for j in range(len(samples)) if j != i], axis=0)
        regions = list(components(others, MIN_FACTOR, RELATIVE))
        sharing = {k: sum(inside[at] for at in zip(*np.nonzero(r), strict=True)) for k, r in enumerate(regions)}
        best = max(sharing.values(), default=0)
        chosen = [k for k, shared in sharing.items() if shared == best and best > 0]
        proposed = zip(*np.nonzero(regions[chosen[-1]]), strict=True) if chosen else ()
        effects.append(np.mean([samples[i][at] for at in proposed]) if chosen else 0.0)
    sem = np.std(effects, ddof=1) / math.sqrt(len(effects))
    return (
        float(np.mean(effects)),
        float(sem),
        float(stats.t.interval(0.95, len(effects) - 1, np.mean(effects), sem)[0]),
    )


@pytest.mark.parametrize("draws", [2, 4, 7])
def test_the_estimate_equals_a_slow_obvious_twin(draws):
    rng, truth = np.random.default_rng(draws), np.zeros((16, 16))
    truth[3:8, 2:9], truth[11:14, 10:15] = 0.6, 0.9
    compared = 0
    for _ in range(5):
        samples = noise(rng, draws, truth, std=0.4)
        for inside in components(samples.mean(0), MIN_FACTOR, RELATIVE, 0.03):
            assert estimate(samples, inside, MIN_FACTOR, RELATIVE) == pytest.approx(slow_estimate(samples, inside))
            compared += 1
    assert compared > 5


def test_a_draw_counts_as_nothing_where_the_others_propose_nothing():
    """All that there is comes from one draw of three."""
    samples = np.zeros((3, 4, 4))
    samples[0, :2] = 3.0
    (inside,) = components(samples.mean(0), MIN_FACTOR, RELATIVE)
    effect, sem, low = estimate(samples, inside, MIN_FACTOR, RELATIVE)
    assert (effect, sem) == (0.0, 0.0)  # that draw: 0; the two others, where it proposes the region: 0 as well
    assert low == 0.0
    assert samples.mean(0)[inside].mean() == 1.0


def test_the_bound_is_students():
    """Four draws that move as one: a region's pixels are not independent, and three degrees of freedom are few."""
    samples = np.array([1.0, 2.0, 3.0, 6.0])[:, None, None] * np.ones((4, 5, 5))
    inside = np.ones((5, 5), dtype=bool)
    effect, sem, low = estimate(samples, inside, MIN_FACTOR, RELATIVE)
    assert effect == 3.0
    assert sem == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert low == pytest.approx(3.0 - 3.1824 * sem, abs=1e-4)


def test_one_draw_has_no_error_bar():
    effect, sem, low = estimate(np.full((1, 2, 2), 0.5), np.eye(2, dtype=bool), MIN_FACTOR, RELATIVE)
    assert (effect, sem, low) == (0.5, math.inf, -math.inf)


def test_on_pure_noise_a_regions_own_mean_flatters_it_and_the_estimate_hardly_does():
    """What is left comes from asking for the component that shares most with what *all* draws propose."""
    rng, own, found = np.random.default_rng(0), [], []
    for _ in range(150):
        samples = noise(rng, 4)
        for inside in components(samples.mean(0), MIN_FACTOR, RELATIVE, 0.01):
            own.append(samples.mean(0)[inside].mean())
            found.append(estimate(samples, inside, MIN_FACTOR, RELATIVE))
    effects, _, lows = np.array(found).T
    assert np.mean(own) > 0.17  # a factor of 1.2, of nothing
    assert np.mean(effects) < np.mean(own) / 3
    assert (lows > 0).mean() < 0.06


@pytest.mark.parametrize(("draws", "effect", "std"), [(4, 1.0, 0.3), (4, 0.5, 0.3), (8, 1.0, 0.6)])
def test_the_lower_bound_lies_above_the_truth_in_a_fortieth_of_cases(draws, effect, std):
    """A planted region; the truth is its mean over the region that was found, which may reach beyond it."""
    rng, truth, runs = np.random.default_rng(draws), np.zeros((16, 16)), 400
    truth[4:10, 5:12] = effect
    above, errors = [], []
    for _ in range(runs):
        samples = noise(rng, draws, truth, std)
        inside = max(components(samples.mean(0), MIN_FACTOR, RELATIVE, 0.01), key=np.sum)
        found, _, low = estimate(samples, inside, MIN_FACTOR, RELATIVE)
        above.append(low > truth[inside].mean())
        errors.append(found - truth[inside].mean())
    assert np.mean(above) == pytest.approx(0.025, abs=3.2 * math.sqrt(0.025 * 0.975 / runs))
    assert abs(np.mean(errors)) < 0.05 * effect
