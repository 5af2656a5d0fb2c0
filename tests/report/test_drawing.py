"""Drawing: colours that mean the same everywhere, boxes in the image's pixels, titles that everybody can read."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import ImageColor
from support.browser import contrast
from support.observations import controls, seen
from support.reports import report_of

from memwatch.judge.verdict import Verdict
from memwatch.measure.regions import Region
from memwatch.report import drawing


def photo(side=64):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def marked(image, values, regions=()):
    return np.asarray(drawing.overlay(image, values, regions))


def test_colours_get_lighter():
    lightness = drawing.colours(np.linspace(0, 1, 100)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert (np.diff(lightness[::10]) > 0).all()


def test_scaled_by_hand():
    given = np.log(np.array([0.25, 1, 2, 4, 100]))
    np.testing.assert_allclose(drawing.scaled(given), [0, 0, 1 / 2, 1, 1])
    assert drawing.scaled(np.array([math.nan, math.inf, -math.inf])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("side", [16, 300, 512])
def test_nothing_stored_leaves_the_image_unchanged(value, side):
    assert np.array_equal(drawing.fitted(photo(side)), marked(photo(side), np.full((8, 8), value)))


def test_heat_is_where_the_map_says_and_does_not_depend_on_what_else_is_there():
    alone, beside = np.zeros((8, 8)), np.zeros((8, 8))
    alone[2:4, 5:7] = beside[2:4, 5:7] = math.log(3)
    beside[7, 7] = math.log(50)
    plain, first, second = np.asarray(drawing.fitted(photo())), marked(photo(), alone), marked(photo(), beside)
    cell = plain.shape[0] // 8
    rows, columns = np.nonzero((plain != first).any(-1))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (2 * cell, 4 * cell, 5 * cell, 7 * cell)
    assert np.array_equal(first[: 7 * cell], second[: 7 * cell])


@pytest.mark.parametrize("side", [64, 512])
def test_boxes_are_in_image_pixels(side):
    image, zoom = np.zeros((side, side, 3), np.uint8), drawing.SHOWN / side
    box = tuple(edge * side // 64 for edge in (16, 8, 48, 40))
    pixels = marked(image, np.zeros((8, 8)), [Region(box, 0.25, 1.0, 0.1)])
    left, top, right, bottom = (round(edge * zoom) for edge in box)
    for row, column in [(top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)]:
        assert pixels[row, column].tolist() == [255, 255, 255]
    outside = np.ones(pixels.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert not pixels[outside].any()


def test_a_factor_is_labelled_beside_its_colour():
    pixels = np.asarray(drawing.colour_bar(400)).astype(int)
    ticks = np.nonzero((pixels[:, 26] == ImageColor.getrgb(drawing.INK)).all(-1))[0]
    for factor, row in zip((4.0, 2.0, 1.0), ticks, strict=True):
        assert np.abs(pixels[row, 10] - drawing.colours(drawing.scaled(np.log([[factor]])))[0, 0]).max() <= 3


# --- titles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_can_be_read_on_its_colour(verdict):
    assert contrast(drawing.ink_on(verdict), drawing.VERDICT_COLOURS[verdict]) >= 4.5  # what the guidelines ask of text


def test_people_without_red_or_without_green_receptors_tell_the_verdicts_apart():
    """Viénot, Brettel and Mollon 1999: what a dichromat sees, as a projection of linear RGB."""
    without_red = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    without_green = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    shown = [(np.array(ImageColor.getrgb(colour)) / 255) ** 2.2 for colour in drawing.VERDICT_COLOURS.values()]
    for sees in (np.eye(3), without_red, without_green):
        seen_as = [np.clip(sees @ colour, 0, 1) ** (1 / 2.2) for colour in shown]
        apart = [np.abs(a - b).max() for a, b in itertools.combinations(seen_as[:3], 2)]
        assert min(apart) > 0.15
        assert min(np.abs(other - seen_as[3]).max() for other in seen_as[:3]) > 0.09  # the least: green without green


def test_a_title_carries_the_colour_of_its_verdict_and_the_reason_of_it():
    rows = report_of(
        seen("begun", 1.8), seen("quiet", 1.0), seen("first", baseline=None), *controls(20, 1.0, spread=0.2)
    ).rows
    bars = {row.verdict: np.asarray(drawing.title_bar(row, 800, 40)) for row in rows.values()}
    for (verdict, pixels), (other, colour) in itertools.product(bars.items(), drawing.VERDICT_COLOURS.items()):
        share = (pixels == ImageColor.getrgb(colour)).all(-1).mean()
        assert (share > 0.03) == (verdict is other)
    third = {verdict: pixels[2 * 56 :] for verdict, pixels in bars.items()}
    assert (third[Verdict.SUSPICIOUS] == ImageColor.getrgb(drawing.QUIET)).all(-1).any()
    assert (third[Verdict.INCONCLUSIVE] == 255).all()  # all is said in the second line
    assert len({pixels.shape for pixels in bars.values()}) == 1


def test_a_text_shrinks_before_its_middle_is_cut_out():
    assert drawing.fitting("cat", 500, 40) == ("cat", drawing.font_of(40))
    long = "a-probe-with-a-name-of-many-words"
    width = drawing.font_of(40).getlength(long)
    text, font = drawing.fitting(long, 0.9 * width, 40)
    assert (text, font.size < 40) == (long, True)
    text, font = drawing.fitting(long, 0.4 * width, 40)
    assert (font.size, font.getlength(text) <= 0.4 * width) == (28, True)
    first, _, last = text.partition("…")
    assert (long.startswith(first), long.endswith(last)) == (True, True)
    assert font.getlength(f"{first}{long[len(first)]}…{last}") > 0.4 * width
