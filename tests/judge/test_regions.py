"""Regions: connected parts of a map above a threshold, and how strong they are on draws that did not propose them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage, stats

from memwatch.judge import regions
from memwatch.judge.regions import MIN_FACTOR, RELATIVE, SMALL, SMALL_RELATIVE, box_of, components, estimate

LIMIT = math.log(MIN_FACTOR)


def test_components_by_hand(monkeypatch):
    monkeypatch.setattr(regions, "MIN_FACTOR", math.e)
    monkeypatch.setattr(regions, "RELATIVE", 0.0)  # the threshold is 1
    values = np.array([[0.0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    first, second = components(values)  # corners touch, and the limit itself counts
    assert np.argwhere(first).tolist() == [[0, 1], [1, 2]]
    assert np.argwhere(second).tolist() == [[3, 0]]
    assert (box_of(first, 8), box_of(second, 1)) == ((8, 0, 24, 16), (0, 3, 1, 4))
    assert [len(list(components(values, share / 16))) for share in (1, 2, 3)] == [2, 1, 0]  # exactly the smallest stays
    assert list(components(np.full((3, 3), 0.99))) == []


def test_a_small_hill_ends_half_way_up_and_a_large_one_at_its_foot():
    """What smoothing leaves of a small square has no plateau; the rim of a large one is part of it."""
    sharp = np.zeros((16, 16))
    sharp[2:6, 2:6] = 1.0
    small = ndimage.uniform_filter(sharp, 3)
    (found,) = components(small)
    top = np.quantile(small[small >= regions.threshold_of(small)], 0.98)
    assert np.array_equal(found, small >= SMALL_RELATIVE * top)
    assert found.sum() < (small >= LIMIT).sum()
    sharp[4:14, 3:15] = 1.0
    large = ndimage.uniform_filter(sharp, 3)
    (found,) = components(large)
    assert found.mean() > SMALL
    assert np.array_equal(found, large >= RELATIVE * np.quantile(large, 0.98))


def noise(rng: np.random.Generator, draws: int, truth: np.ndarray | float = 0.0, std: float = 0.3) -> np.ndarray:
    """One map per noise draw, ``(draws, 16, 16)``: smooth noise of that standard deviation around the truth."""
    smooth = ndimage.uniform_filter(rng.standard_normal((draws, 16, 16)), (0, 3, 3))
    return truth + std * 3 * smooth  # the mean of nine


def slow_estimate(samples: np.ndarray, inside: np.ndarray) -> tuple[float, float, float]:
    """Draw by draw and pixel by pixel."""
    effects, n = [], len(samples)
    for i in range(n):
        proposed = list(components(np.mean([samples[j] for j in range(n) if j != i], axis=0)))
        shared = [sum(inside[at] for at in zip(*np.nonzero(region), strict=True)) for region in proposed]
        best = [region for region, count in zip(proposed, shared, strict=True) if count == max(shared) > 0]
        effects.append(np.mean([samples[i][at] for at in zip(*np.nonzero(best[-1]), strict=True)]) if best else 0.0)
    mean, sem = float(np.mean(effects)), float(np.std(effects, ddof=1) / math.sqrt(n))
    return mean, sem, float(stats.t.interval(0.95, n - 1, mean, sem)[0])


@pytest.mark.parametrize("draws", [2, 4, 7])
def test_the_estimate_equals_a_slow_obvious_twin(draws):
    rng, truth, compared = np.random.default_rng(draws), np.zeros((16, 16)), 0
    truth[3:8, 2:9], truth[11:14, 10:15] = 0.6, 0.9
    for _ in range(5):
        samples = noise(rng, draws, truth, std=0.4)
        for inside in components(samples.mean(0), 0.03):
            assert estimate(samples, inside) == pytest.approx(slow_estimate(samples, inside))
            compared += 1
    assert compared > 5


def test_estimates_by_hand():
    """One draw of three holds all; four draws move as one (Student's t, 3 degrees of freedom); one draw alone."""
    samples = np.zeros((3, 4, 4))
    samples[0, :2] = 3.0
    (inside,) = components(samples.mean(0))
    assert samples.mean(0)[inside].mean() == 1.0
    assert estimate(samples, inside) == (0.0, 0.0, 0.0)  # a draw counts as 0 where the others propose nothing
    whole = np.ones((5, 5), dtype=bool)
    effect, sem, low = estimate(np.array([1.0, 2.0, 3.0, 6.0])[:, None, None] * whole, whole)
    assert (effect, sem) == (3.0, pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2))
    assert low == pytest.approx(3.0 - 3.1824 * sem, abs=1e-4)
    assert estimate(np.full((1, 5, 5), 0.5), whole) == (0.5, math.inf, -math.inf)


def test_on_pure_noise_a_regions_own_mean_flatters_it_and_the_estimate_hardly_does():
    """What is left comes from asking for the component that shares most with what *all* draws propose."""
    rng, own, found = np.random.default_rng(0), [], []
    for _ in range(150):
        samples = noise(rng, 4)
        for inside in components(samples.mean(0), 0.01):
            own.append(samples.mean(0)[inside].mean())
            found.append(estimate(samples, inside))
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
        inside = max(components(samples.mean(0), 0.01), key=np.sum)
        found, _, low = estimate(samples, inside)
        above.append(low > truth[inside].mean())
        errors.append(found - truth[inside].mean())
    assert np.mean(above) == pytest.approx(0.025, abs=3.2 * math.sqrt(0.025 * 0.975 / runs))
    assert abs(np.mean(errors)) < 0.05 * effect
