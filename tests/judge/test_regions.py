"""Regions: connected places of a map above a threshold, against numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from memwatch.judge.regions import Region, find_regions, threshold_of
from memwatch.measure.curvature import CurvatureMap


def test_by_hand():
    first = torch.tensor([[0.0, 4, 0, 0], [0, 0, 6, 0], [0, 0, 0, 0], [1.5, 0, 0, 0]])
    second = torch.tensor([[0.0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [2.5, 0, 0, 0]])
    regions, labels = find_regions(CurvatureMap(torch.stack([first, second])), 2.0, scale=8)
    # pixels (0, 1) and (1, 2) touch at a corner: one region; means 3 and 4; replicates 5 and 2
    assert [replace(region, sem=0.0) for region in regions] == [
        Region(box=(8, 0, 24, 16), area=2 / 16, peak=4.0, mean=3.5, sem=0.0),
        Region(box=(0, 24, 8, 32), area=1 / 16, peak=2.0, mean=2.0, sem=0.0),
    ]
    assert [region.sem for region in regions] == pytest.approx([1.5, 0.5])
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 1] = expected[1, 2] = 1
    expected[3, 0] = 2
    assert np.array_equal(labels, expected)


def test_threshold_is_inclusive_and_absolute():
    values = CurvatureMap(torch.tensor([[[1.0, 0.5]], [[1.0, 0.5]]]))
    assert [r.area for r in find_regions(values, 1.0)[0]] == [0.5]
    assert [r.area for r in find_regions(values, 0.5)[0]] == [1.0]
    assert find_regions(values, 1.01)[0] == ()


def test_min_area_drops_small_regions_and_renumbers():
    values = torch.zeros(2, 4, 4)
    values[:, 0, 0] = 100.0
    values[:, 2:, 2:] = 1.0
    regions, labels = find_regions(CurvatureMap(values), 0.5, min_area=2 / 16)
    assert [r.box for r in regions] == [(2, 2, 4, 4)]
    assert labels[0, 0] == 0
    assert labels.max() == 1
    assert len(find_regions(CurvatureMap(values), 0.5, min_area=1 / 16)[0]) == 2  # exactly the smallest is kept


def test_largest_sum_first():
    values = torch.zeros(2, 1, 8)
    values[:, 0, 0] = 3.0
    values[:, 0, 3:8] = 1.0
    assert [r.box for r in find_regions(CurvatureMap(values), 0.5)[0]] == [(3, 0, 8, 1), (0, 0, 1, 1)]


def test_error_of_the_mean_is_over_replicates_not_pixels():
    """Replicates that move as one: pixels in a region are not independent."""
    samples = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None].expand(4, 5, 5)
    (region,), _ = find_regions(CurvatureMap(samples), 0.0)
    assert region.mean == 3.0
    assert region.sem == pytest.approx(samples[:, 0, 0].std().item() / 2)


def test_one_replicate_has_no_error_bar():
    (region,), _ = find_regions(CurvatureMap(torch.ones(1, 2, 2)), 0.5)
    assert math.isinf(region.sem)


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0])
def test_nothing_there(value):
    regions, labels = find_regions(CurvatureMap(torch.full((2, 3, 3), value)), 0.1)
    assert regions == ()
    assert not labels.any()


def test_the_threshold_is_a_share_of_the_peak_but_no_trifle():
    values = np.zeros((10, 10))
    values[:, :5] = 2.0
    values[0, 0] = 50.0  # one odd pixel
    assert threshold_of(values, 1.1, 0.35) == pytest.approx(0.7)
    assert threshold_of(values, 3.0, 0.35) == pytest.approx(math.log(3))
    assert threshold_of(values, 1.1, 0.0) == pytest.approx(math.log(1.1))
    assert threshold_of(-values, 1.1, 0.35) == pytest.approx(math.log(1.1))
