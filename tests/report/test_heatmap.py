"""Pictures: colours that mean the same everywhere, heat where the map says, boxes in the image's pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memwatch.judge.regions import Region
from memwatch.report.heatmap import SHOWN, colour_bar, colours, fitted, height_of, overlay, scaled


def photo(side=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def both(image, values, regions=()):
    """The plain image, and the same under its heatmap."""
    return np.asarray(fitted(image)), np.asarray(overlay(image, values, regions))


def test_colours_get_lighter():
    lightness = colours(np.linspace(0, 1, 100)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert (np.diff(lightness[::10]) > 0).all()


def test_scaled_by_hand():
    given = np.log(np.array([0.25, 1, math.sqrt(6), 6, 100]))
    np.testing.assert_allclose(scaled(given), [0, 0, 1 / 2, 1, 1])
    assert scaled(np.array([math.nan, math.inf, -math.inf])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("side", [16, 64, 300, 512])
def test_nothing_stored_leaves_the_image_unchanged(value, side):
    plain, marked = both(photo(side), np.full((8, 8), value))
    assert np.array_equal(plain, marked)


def test_scale_is_absolute():
    """A pixel's colour depends on its own value, not on what else is in the map."""
    image, alone, beside = np.zeros((64, 64, 3), np.uint8), np.zeros((8, 8)), np.zeros((8, 8))
    alone[0, 0] = beside[0, 0] = math.log(3)
    beside[7, 7] = math.log(50)
    first, second = (both(image, values)[1] for values in (alone, beside))
    corner = first.shape[0] // 8
    assert np.array_equal(first[:corner, :corner], second[:corner, :corner])
    assert first[0, 0].any()
    assert not first[corner:].any()


def test_heat_is_where_the_map_says():
    values = np.zeros((8, 8))
    values[2:4, 5:7] = math.log(8)
    plain, marked = both(photo(), values)
    cell = plain.shape[0] // 8
    rows, columns = np.nonzero((plain != marked).any(-1))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (2 * cell, 4 * cell, 5 * cell, 7 * cell)


@pytest.mark.parametrize("side", [64, 512])
def test_boxes_are_in_image_pixels(side):
    image, zoom = np.zeros((side, side, 3), np.uint8), SHOWN / side
    box = tuple(edge * side // 64 for edge in (16, 8, 48, 40))
    _, marked = both(image, np.zeros((8, 8)), [Region(box, 0.25, 1.0, math.log(5), 0.1, 1.2)])
    left, top, right, bottom = (round(edge * zoom) for edge in box)
    for row, column in [(top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)]:
        assert marked[row, column].tolist() == [255, 255, 255]
    outside = np.ones(marked.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert not marked[outside].any()


def test_a_factor_lies_beside_its_colour():
    pixels = np.asarray(colour_bar(400)).astype(int)
    for factor in (1.0, 1.5, 2.0, 3.7, 6.0):
        beside = pixels[round(height_of(factor, 400)), 10]
        assert np.abs(beside - colours(scaled(np.log([[factor]])))[0, 0]).max() <= 3
    assert [height_of(factor, 400) for factor in (0.5, 99.0)] == [385, 14]
