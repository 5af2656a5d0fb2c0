"""Pictures: colours that mean the same everywhere, heat where the map says, boxes in the image's pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from support.observations import controls, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.regions import Region
from memwatch.measure.copies import Proof
from memwatch.report.heatmap import (
    BAR,
    FRAME,
    STOPS,
    colour_bar,
    colours,
    contact_sheet,
    overlay,
    picture_of,
    pictures_of,
    scaled,
    with_generations,
)


def photo(side=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def panels(picture):
    """The plain image and the marked one."""
    side = picture.height
    pixels = np.asarray(picture)
    return pixels[:, :side], pixels[:, side + 4 : 2 * side + 4]


def test_colours_run_from_the_first_stop_to_the_last():
    found = colours(np.array([[0.0, 1.0, -3.0, 7.0, 0.5]]))
    assert found.dtype == np.uint8
    assert found[0].tolist() == [STOPS[i].astype(int).tolist() for i in (0, 8, 0, 8, 4)]


def test_colours_get_lighter():
    lightness = colours(np.linspace(0, 1, 100)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert (np.diff(lightness[::10]) > 0).all()


def test_scaled_by_hand():
    given = np.log(np.array([0.25, 1, 2, 4, 8, 100]))
    np.testing.assert_allclose(scaled(given, 8.0), [0, 0, 1 / 3, 2 / 3, 1, 1])
    assert scaled(np.array([math.nan, math.inf, -math.inf]), 8.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("side", [16, 64, 512])
def test_nothing_stored_leaves_the_image_unchanged(value, side):
    image = photo(side)
    plain, marked = panels(overlay(image, np.full((8, 8), value)))
    assert np.array_equal(plain, marked)
    zoom = plain.shape[0] // side
    assert np.array_equal(plain, image.repeat(zoom, 0).repeat(zoom, 1))


def test_scale_is_absolute():
    """A pixel's colour depends on its own value, not on what else is in the map."""
    image, alone, beside = np.zeros((64, 64, 3), np.uint8), np.zeros((8, 8)), np.zeros((8, 8))
    alone[0, 0] = beside[0, 0] = math.log(3)
    beside[7, 7] = math.log(50)
    first, second = (panels(overlay(image, values))[1] for values in (alone, beside))
    corner = first.shape[0] // 8
    assert np.array_equal(first[:corner, :corner], second[:corner, :corner])
    assert first[0, 0].any()
    assert not first[corner:].any()


def test_heat_is_where_the_map_says():
    values = np.zeros((8, 8))
    values[2:4, 5:7] = math.log(8)
    plain, marked = panels(overlay(photo(), values))
    cell = plain.shape[0] // 8
    rows, columns = np.nonzero((plain != marked).any(-1))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (2 * cell, 4 * cell, 5 * cell, 7 * cell)


def test_full_heat_by_hand():
    _, marked = panels(overlay(np.zeros((64, 64, 3), np.uint8), np.full((8, 8), 10.0)))
    expected = (STOPS[-1] * 0.85).round()
    assert (np.abs(marked - expected) <= 1).all()


def test_top_of_the_scale_is_an_argument():
    image, values = np.zeros((64, 64, 3), np.uint8), np.full((8, 8), math.log(4))
    low, high = (panels(overlay(image, values, max_factor=top))[1].mean() for top in (4.0, 64.0))
    assert low > high > 0


def test_boxes_are_in_image_pixels():
    image = np.zeros((64, 64, 3), np.uint8)
    _, marked = panels(overlay(image, np.zeros((8, 8)), [Region((16, 8, 48, 40), 0.25, 1.0, math.log(5), 0.1, 1.2)]))
    zoom = marked.shape[0] // 64
    left, top, right, bottom = (edge * zoom for edge in (16, 8, 48, 40))
    for row, column in [(top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)]:
        assert marked[row, column].tolist() == [255, 255, 255]
    outside = np.ones(marked.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert not marked[outside].any()


def test_the_given_arrays_are_not_changed():
    image, values = photo(), np.full((8, 8), 1.0)
    before = image.copy()
    overlay(image, values, [Region((0, 0, 8, 8), 0.1, 1.0, 1.0, 0.1, 0.8)])
    assert np.array_equal(image, before)
    assert (values == 1).all()


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert overlay(photo(64), np.zeros((8, 8))).size == (2 * 384 + BAR + 8, 384)
    assert overlay(photo(512), np.zeros((64, 64))).size == (2 * 512 + BAR + 8, 512)


@pytest.mark.parametrize("top", [1.5, 2.0, 8.0, 10.0])
def test_colour_bar(top):
    pixels = np.asarray(colour_bar(200, top))
    assert pixels.shape == (200, BAR, 3)
    assert pixels[14, 10].tolist() == STOPS[-1].astype(int).tolist()
    assert pixels[185, 10].tolist() == STOPS[0].astype(int).tolist()


def test_contact_sheet():
    colour = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = contact_sheet([Image.new("RGB", (10, 6), c) for c in colour], columns=2)
    assert sheet.size == (26, 18)
    assert [sheet.getpixel(at) for at in [(0, 0), (16, 0), (0, 12), (16, 12)]] == [*colour, (255, 255, 255)]


def test_a_finding_is_shown_by_its_own_map_and_regions():
    config, image = load_config(None), photo(32)
    observation = seen(image=image)
    (finding,) = judge_event([observation, *controls(20, 1.0)], {}, 1, config).findings
    assert finding.regions
    expected = overlay(image, finding.signals.decisive.mean.numpy(), finding.regions, max_factor=6.0)
    assert np.array_equal(np.asarray(picture_of(finding, 6.0)), np.asarray(expected))
    assert not np.array_equal(*panels(picture_of(finding, 6.0)))


def test_generations_lie_on_the_right_and_copies_are_framed():
    colour = [(0, 0, 255), (0, 255, 0), (0, 0, 0)]
    generations = np.stack([np.full((8, 8, 3), c, np.uint8) for c in colour])
    proof = Proof(generations, (0.1, 0.9, 0.2), (("a",), (), ("a",)), 3)
    plain = overlay(photo(64), np.zeros((8, 8)))
    shown = with_generations(plain, proof)
    assert shown.height == plain.height
    assert np.array_equal(np.asarray(shown)[:, : plain.width], np.asarray(plain))
    cell, first = plain.height // 2, plain.width + 4
    for i, (column, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
        left, top = first + column * cell, row * cell
        assert shown.getpixel((left + cell // 2, top + cell // 2)) == colour[i]
        assert (shown.getpixel((left, top)) == FRAME) == proof.is_copy[i]
    assert shown.getpixel((first + cell + cell // 2, cell + cell // 2)) == (255, 255, 255)
    alone = with_generations(plain, Proof(generations[:1], (0.1,), (("a",),), 3))
    assert alone.width == first + plain.height


def test_a_finding_with_nothing_to_compare_shows_the_image_and_one_without_image_is_not_shown():
    config, image = load_config(None), photo(32)
    first, unseen = seen("first", image=image, baseline=None, baseline_step=None), seen("unseen")
    findings = judge_event([first, unseen], {}, 1, config).findings
    assert np.array_equal(*panels(picture_of(findings[0], 6.0)))
    assert picture_of(findings[1], 6.0) is None
    pictures = pictures_of(findings, config)
    assert list(pictures) == ["first"]
    top = picture_of(findings[0], config.heatmap.max_factor)
    assert np.array_equal(np.asarray(pictures["first"]), np.asarray(top))
