"""Regions: connected parts of a heatmap above a threshold, and how strong each is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu
from support.observations import seen

from memwatch.measure import regions
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.regions import (
    MIN_AREA,
    MIN_FACTOR,
    Region,
    box_of,
    components,
    region_of,
    regions_of,
    threshold_of,
)
from memwatch.measure.signals import Signals

LIMIT = math.log(MIN_FACTOR)


def test_components_by_hand(monkeypatch):
    monkeypatch.setattr(regions, "threshold_of", lambda values: 1.0)
    values = np.array([[0.0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    first, second = components(values)  # corners touch, and the limit itself counts
    assert np.argwhere(first).tolist() == [[0, 1], [1, 2]]
    assert np.argwhere(second).tolist() == [[3, 0]]
    assert (box_of(first, 8), box_of(second, 1)) == ((8, 0, 24, 16), (0, 3, 1, 4))
    assert [len(list(components(values, share / 16))) for share in (1, 2, 3)] == [2, 1, 0]  # exactly the smallest stays
    assert list(components(np.full((3, 3), 0.99))) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_equals_that_of_scikit_image(seed):
    """Two classes of pixels that hardly overlap."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.0, 0.2, (32, 32))
    values[4:14, 3:20] += 1.5
    inside = values >= threshold_of(values)
    assert (inside != (values > threshold_otsu(values, nbins=100_000))).sum() <= 1  # it cuts at the middle of a bin
    assert threshold_of(values / 100) == LIMIT  # next to nothing is no region
    assert threshold_of(np.full((4, 4), 2.0)) == threshold_of(np.full((1, 1), 2.0)) == 2.0


def test_a_region_by_hand():
    """Its effect is the mean inside, its error that of the draws' means: 1, 2, 3 and 6."""
    samples, inside = np.full((4, 4, 4), 9.0), np.zeros((4, 4), dtype=bool)
    inside[1:3, 2:4] = True
    for sample, value in zip(samples, (1, 2, 3, 6), strict=True):
        sample[inside] = np.array([-1, 1, -2, 2]) + value
    sem = math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    assert region_of(samples, inside, 8) == Region((16, 8, 32, 24), 4 / 16, 3.0, pytest.approx(sem))
    assert region_of(samples[:1], inside, 1) == Region((2, 1, 4, 3), 4 / 16, 1.0, math.inf)  # one draw has no error


def heatmap_of(mean: np.ndarray) -> Signals:
    """Signals whose heatmap has that mean, with draws 0.1 above and below; twice as much has fallen."""
    samples = torch.from_numpy(mean) + torch.tensor([-0.1, 0.1])[:, None, None]
    return Signals(None, None, None, None, heatmap=CurvatureMap(samples), fallen=CurvatureMap(2 * samples))


def test_regions_come_from_the_heatmap_the_strongest_first():
    """Strength is the effect times the root of the area: large and faint beats small and strong, and the reverse."""
    observation = replace(seen(), image=np.zeros((64, 64, 3), np.uint8))  # 4 pixels per pixel of the map
    for faint, first in ((0.6, "large"), (0.2, "small")):
        mean = np.zeros((16, 16))
        mean[2:6, 2:6], mean[:, 10:] = 0.5, faint
        found, labels = regions_of(observation, heatmap_of(mean))
        boxes = {"small": (8, 8, 24, 24), "large": (40, 0, 64, 64)}
        assert [r.box for r in found] == [boxes[first], *(box for name, box in boxes.items() if name != first)]
        assert [labels[labels == i].size / 256 for i in (1, 2)] == [r.area for r in found]
        assert [r.effect for r in found] == [pytest.approx(2 * mean[labels == i].mean()) for i in (1, 2)]
        strengths = [r.effect * math.sqrt(r.area) for r in found]
        assert strengths == sorted(strengths, reverse=True)


def test_what_is_too_small_or_not_known_is_no_region():
    mean = np.zeros((16, 16))
    mean[3, 3 : 3 + math.ceil(256 * MIN_AREA) - 1] = 1.0
    found, labels = regions_of(seen(), heatmap_of(mean))
    assert (found, labels.any()) == ((), False)
    assert regions_of(seen(), None) == ((), None)
    assert regions_of(seen(), Signals(None, None, None, None)) == ((), None)
