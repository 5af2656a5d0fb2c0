"""Pictures of one probe: what lies where, and that the first row stays where it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.observations import controls, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.measure.copies import Proof
from memwatch.report.heatmap import BAR, SHOWN, colour_bar, fitted, overlay
from memwatch.report.picture import (
    COPY,
    LETTERS,
    LINE,
    MARGIN,
    WIDTH,
    cropped,
    generations,
    heat_panel,
    image_panel,
    nearest_of,
    pair,
    picture_of,
    pictures_of,
    region_panels,
)
from memwatch.report.report import Report

CAPTION = round(LETTERS * LINE)
FRAME = tuple(int(COPY[i : i + 2], 16) for i in (1, 3, 5))


def photo(side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def finding(proof=None, **parts):
    parts = {"image": photo()} | parts
    found = judge_event([seen(**parts), *controls(20, 1.0)], {}, 1, load_config(None)).findings[0]
    return replace(found, proof=proof)


def proof(*ratios, side=32):
    pictures = np.stack([photo(side, seed=10 + i) for i in range(len(ratios))])
    return Proof(pictures, ratios, ((),) * len(ratios), 3)


def first_row(picture):
    """The two squares and the colour bar."""
    top = picture.height - 2 * (SHOWN + CAPTION) if picture.height > 2 * SHOWN else picture.height - SHOWN - CAPTION
    left = [MARGIN, 2 * MARGIN + SHOWN]
    squares = [picture.crop((x, top, x + SHOWN, top + SHOWN)) for x in left]
    return [np.asarray(part) for part in (*squares, picture.crop((WIDTH - BAR, top, WIDTH, top + SHOWN)))]


def test_a_finding_is_shown_by_its_own_image_map_and_regions():
    found = finding()
    assert found.regions
    image, heat, bar = first_row(picture_of(found, 100))
    expected = overlay(photo(), found.signals.decisive.mean.numpy(), found.regions)
    assert np.array_equal(image, np.asarray(fitted(photo())))
    assert np.array_equal(heat, np.asarray(expected))
    assert np.array_equal(bar, np.asarray(colour_bar(SHOWN)))


def test_the_first_row_lies_at_the_same_place_with_and_without_a_second_one():
    """So that a dashboard's step slider shows one probe changing."""
    shown = [finding(), finding(proof(0.9, 0.2)), finding(fallen=1.0)]
    assert [bool(f.regions) for f in shown] == [True, True, False]
    pictures = [picture_of(f, 100) for f in shown]
    assert {picture.width for picture in pictures} == {WIDTH}
    assert pictures[2].height < pictures[0].height
    top = pictures[2].height - SHOWN - CAPTION
    for picture in pictures:
        square = picture.crop((MARGIN, top, MARGIN + SHOWN, top + SHOWN))
        assert np.array_equal(np.asarray(square), np.asarray(fitted(photo())))


def test_captions_say_what_is_seen():
    assert image_panel(finding())[1] == "training image"
    assert image_panel(finding(reference=False))[1] == "generated from prompt"
    assert heat_panel(finding())[1] == "heatmap, 4x4 latent pixels"
    assert heat_panel(finding(baseline=None))[1] == "no heatmap"
    captions = [caption for _, caption in region_panels(finding())]
    assert captions == ["the region enlarged: image | heatmap"]
    captions = [caption for _, caption in region_panels(finding(proof(0.9, 0.2)))]
    assert captions == ["generated now: 1 of 2 copies the region", "enlarged: image | nearest generation"]
    captions = [caption for _, caption in region_panels(finding(proof(math.inf, math.inf)))]
    assert captions == ["generated now: 2, a copy cannot be told", "enlarged: image | heatmap"]


def test_the_region_enlarged_is_the_image_beside_the_nearest_generation():
    drawn, found = proof(0.9, 0.2, math.inf), finding()
    assert nearest_of(drawn) == 1
    box = found.regions[0].box
    _, (enlarged, _) = region_panels(replace(found, proof=drawn))
    expected = pair(cropped(photo(), box, (32, 32)), cropped(drawn.generations[1], box, (32, 32)))
    left = (SHOWN - expected.width) // 2
    assert np.array_equal(np.asarray(enlarged)[:, left : left + expected.width], np.asarray(expected))


@pytest.mark.parametrize(("shape", "size"), [((10, 40), (200, 108)), ((40, 10), (108, 200)), ((20, 20), (200, 96))])
def test_a_pair_lies_as_it_is_larger(shape, size):
    one, other = (np.full((*shape, 3), value, np.uint8) for value in (50, 200))
    both = pair(one, other, 200, 200)
    assert both.size == size
    assert both.getpixel((0, 0)) == (50, 50, 50)
    assert both.getpixel((both.width - 1, both.height - 1)) == (200, 200, 200)


def test_copies_are_framed_and_the_others_are_not():
    colour = [(0, 0, 255), (0, 255, 0), (0, 0, 0)]
    drawn = np.stack([np.full((8, 8, 3), c, np.uint8) for c in colour])
    given = Proof(drawn, (0.1, 0.9, 0.2), (("a",), (), ("a",)), 3)
    sheet, cell = generations(given, 200), 100
    assert sheet.size == (200, 200)
    for i, (column, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
        left, top = column * cell, row * cell
        assert sheet.getpixel((left + cell // 2, top + cell // 2)) == colour[i]
        assert (sheet.getpixel((left + cell // 2, top + cell - 2)) == FRAME) == given.is_copy[i]
    assert sheet.getpixel((150, 150)) == (255, 255, 255)


def test_a_finding_with_nothing_to_compare_shows_the_image_and_one_without_image_is_not_shown():
    config = load_config(None)
    first, unseen = seen("first", image=photo(), baseline=None, baseline_step=None), seen("unseen")
    report = Report(100, config, judge_event([first, unseen], {}, 1, config), False, 1.0, 0, None)
    pictures = pictures_of(report)
    assert list(pictures) == ["first"]
    image, heat, _ = first_row(pictures["first"])
    assert np.array_equal(image, heat)
    expected = picture_of(report.findings[0], 100)
    assert np.array_equal(np.asarray(pictures["first"]), np.asarray(expected))
