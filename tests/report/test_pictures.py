"""Pictures: what lies where, what the captions and headlines say, and the awkward events."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.observations import controls, measured, seen
from support.reports import report_of

import memwatch.report.pictures
from memwatch.judge.copied import Proof
from memwatch.judge.verdict import Verdict
from memwatch.report.drawing import BAR, SHOWN, colour_bar, fitted, line_of, overlay, paragraph
from memwatch.report.pictures import (
    BOTH,
    CAPTION,
    CARDS,
    COPY,
    EDGE,
    GRID,
    HEADLINE,
    LETTERS,
    MARGIN,
    WIDTH,
    card,
    cropped,
    first_panels,
    generations,
    measure,
    overview_of,
    pair,
    picture_of,
    region_panels,
)

FRAME = tuple(int(COPY[i : i + 2], 16) for i in (1, 3, 5))
M, S, N, I = Verdict  # noqa: E741


def photo(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def one(proof=None, **parts):
    """The report of one probe."""
    report = report_of(seen(**{"image": photo()} | parts), *controls(20, 1.0))
    return with_findings(report, replace(report.findings[0], proof=proof))


def with_findings(report, *findings):
    return replace(report, judgement=replace(report.judgement, findings=findings))


def drawn(report):
    return picture_of(report, report.findings[0])


def proof(*ratios):
    pictures = np.stack([photo(seed=10 + i) for i in range(len(ratios))])
    return Proof(pictures, ratios, ((),) * len(ratios), 3)


def first_row(picture):
    """The two squares and the colour bar."""
    top = picture.height - 2 * (SHOWN + CAPTION) if picture.height > 2 * SHOWN else picture.height - SHOWN - CAPTION
    boxes = [(MARGIN, SHOWN), (2 * MARGIN + SHOWN, SHOWN), (2 * MARGIN + BOTH, BAR)]
    return [np.asarray(picture.crop((left, top, left + width, top + SHOWN))) for left, width in boxes]


def test_a_finding_is_shown_by_its_own_image_map_and_regions():
    report = one()
    (found,) = report.findings
    assert found.regions
    expected = overlay(photo(), found.signals.heatmap.mean.numpy(), found.regions)
    for shown, wanted in zip(first_row(drawn(report)), (fitted(photo()), expected, colour_bar(SHOWN)), strict=True):
        assert np.array_equal(shown, wanted)


def test_the_first_row_lies_at_the_same_place_with_and_without_a_second_one():
    """So that a dashboard's step slider shows one probe changing."""
    pictures = [drawn(report) for report in (one(), one(proof(0.9, 0.2)), one(fallen=1.0), one(baseline=None))]
    assert len({picture.width for picture in pictures}) == 1
    assert pictures[0].height == pictures[1].height > pictures[2].height == pictures[3].height
    top = pictures[2].height - SHOWN - CAPTION
    for picture in pictures:
        square = picture.crop((MARGIN, top, MARGIN + SHOWN, top + SHOWN))
        assert np.array_equal(square, fitted(photo()))


@pytest.mark.parametrize(
    ("panels", "report", "captions"),
    [
        (first_panels, one(), ["training image", "heatmap, 4x4 latent pixels"]),
        (first_panels, one(reference=False, baseline=None), ["generated from prompt", "no heatmap"]),
        (region_panels, one(), ["the region enlarged: image | heatmap"]),
        (
            region_panels,
            one(proof(0.9, 0.2)),
            ["generated now: 1 of 2 copies the region", "enlarged: image | nearest generation"],
        ),
        (
            region_panels,
            one(proof(math.inf, math.inf)),
            ["generated now: 2, a copy cannot be told", "enlarged: image | heatmap"],
        ),
    ],
)
def test_captions_say_what_is_seen(panels, report, captions):
    assert [caption for _, caption in panels(report.findings[0])] == captions


def test_the_region_enlarged_is_the_image_beside_the_nearest_generation():
    generated = proof(0.9, 0.2, math.inf)
    (found,) = one(generated).findings
    _, (enlarged, _) = region_panels(found)
    parts = (cropped(image, found.regions[0].box, (32, 32)) for image in (photo(), generated.generations[1]))
    assert np.array_equal(enlarged, pair(*parts))


@pytest.mark.parametrize(("shape", "size"), [((10, 40), (200, 108)), ((40, 10), (108, 200)), ((20, 20), (200, 96))])
def test_a_pair_lies_as_it_is_larger(shape, size):
    both = pair(*(np.full((*shape, 3), value, np.uint8) for value in (50, 200)), 200, 200)
    assert (both.size, both.getpixel((0, 0)), both.getpixel((both.width - 1, both.height - 1))) == (
        size,
        (50, 50, 50),
        (200, 200, 200),
    )


def test_copies_are_framed_and_the_others_are_not():
    colour = [(0, 0, 255), (0, 255, 0), (0, 0, 0)]
    pictures = np.stack([np.full((8, 8, 3), c, np.uint8) for c in colour])
    given = Proof(pictures, (0.1, 0.9, 0.2), (("a",), (), ("a",)), 3)
    sheet, cell = generations(given, 200), 100
    for i, (column, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
        left, top = column * cell, row * cell
        assert sheet.getpixel((left + cell // 2, top + cell // 2)) == colour[i]
        assert (sheet.getpixel((left + cell // 2, top + cell - 2)) == FRAME) == given.is_copy[i]
    assert sheet.getpixel((150, 150)) == (255, 255, 255)


# --- the overview -----------------------------------------------------------------------------------------------------


def probes(count, **parts):
    return [seen(f"probe-{i}", 1.2 + 0.2 * i, image=photo(), **parts) for i in range(count)]


def top_of(picture, part) -> list[int]:
    """Where a part lies in a picture: the rows of its top, searched for at any column where cards begin."""
    whole, part = np.asarray(picture), np.asarray(part)
    lefts = [EDGE + i * (part.shape[1] + EDGE) for i in range(3)]
    tops = range(len(whole) - len(part) + 1)
    return [y for x in lefts for y in tops if np.array_equal(whole[y : y + len(part), x : x + part.shape[1]], part)]


def test_the_second_line_says_what_the_controls_show_and_whether_training_stopped():
    report = report_of(*probes(1), *controls(20, 1.25))
    scored = "20 controls scored 0.0 at most so far, and memorized is called from a mean of "
    calibrated = f"20 held-out controls reach 1.2x at most; {scored}{report.scalars()['memwatch/called_from']:.1f} on."
    assert measure(report) == calibrated
    assert measure(replace(report, stop_reason="enough")) == f"memwatch stopped the training. {calibrated}"
    assert measure(report_of(*probes(1))).startswith("There are no controls, so a probe can be called suspicious")
    first = report_of(*probes(1, baseline=None), *controls(20, 1.0, baseline=None))
    assert measure(first) == "The controls were not compared with anything at this event."


def test_the_worst_have_cards_and_the_others_are_named(monkeypatch):
    shown = []
    monkeypatch.setattr(memwatch.report.pictures, "card", lambda r, f, *rest: shown.append(f.name) or card(r, f, *rest))
    given = report_of(*probes(CARDS + 3), *controls(20, 1.0), step=200)
    verdicts = zip(given.findings, (M, S, *[N] * (CARDS + 1)), strict=True)
    given = with_findings(given, *(replace(f, state=replace(f.state, verdict=verdict)) for f, verdict in verdicts))
    picture, worst = overview_of(given), given.event.worst_first
    assert shown == [row.name for row in worst[:CARDS]]
    assert shown[:2] == ["probe-0", "probe-1"]
    first, second = (top_of(picture, card(given, given.findings[i], (GRID - 2 * EDGE) // 3, 2)) for i in (0, 1))
    assert (len(first), first) == (1, second)
    title = line_of(f"Step 200: {given.event.counts()}", WIDTH - 2 * EDGE, HEADLINE)
    names = ", ".join(row.title for row in worst[CARDS:])
    assert top_of(picture, title) == [EDGE]
    assert top_of(picture, paragraph(f"3 more without evidence: {names}", GRID, LETTERS))


@pytest.mark.parametrize(
    "observations",
    [
        [seen("a" * 60, image=photo()), *controls(20, 1.1)],
        [seen("a"), seen("b", 1.2), *controls(20, 1.1)],
        [seen("a", image=photo(), baseline=None), *controls(20, 1.1, baseline=None)],
        [seen("a", image=photo(), now=measured(math.nan)), *controls(20, 1.1)],
        [seen("猫", reference=False, image=photo()), *controls(20, 1.1, reference=False)],
        [seen("a", image=photo()[:20]), seen("b"), seen("c", 1e9, image=photo()[:, :9])],
    ],
    ids=["long name", "no images", "first event", "not finite", "prompt", "odd shapes"],
)
def test_awkward_events_are_drawn(observations):
    report = report_of(*observations)
    shown = [overview_of(report), *(picture_of(report, f) for f in report.findings if f.observation.image is not None)]
    assert shown[0].width == WIDTH
    assert overview_of(report_of(failure="lost")) is None
    assert all(len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20 for picture in shown)


def test_a_card_shows_the_nearest_generation():
    pictures = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 200)])
    for given, shade in ((Proof(pictures, (0.9, 0.1, 0.2), ((),) * 3, 3), 90), (None, 255)):
        report = one(given)
        assert (np.asarray(card(report, report.findings[0], 616, 3))[-100, 420:600] == shade).all()
