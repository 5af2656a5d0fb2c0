"""Overviews: what the title says, which cards there are in which order, and the awkward events."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.observations import controls, measured, seen

import memwatch.report.overview
from memwatch.config_file import load_config
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Judgement, judge_event
from memwatch.measure.copies import Proof
from memwatch.report.overview import (
    CARDS,
    CHART,
    EDGE,
    GRID,
    LETTERS,
    WIDTH,
    card,
    generation,
    headline,
    measure,
    overview_of,
)
from memwatch.report.report import Report
from memwatch.report.severity_axis import band
from memwatch.report.title_bar import strip

PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def report(*observations, stop=None, **settings):
    config = replace(load_config(None), **settings)
    calibrated = any(o.probe.is_control for o in observations)
    return Report(200, config, judge_event(observations, {}, 200, config), calibrated, 1.0, 0, stop)


def with_verdicts(given, *verdicts):
    found = [replace(f, state=replace(f.state, verdict=v)) for f, v in zip(given.findings, verdicts, strict=True)]
    return replace(given, judgement=replace(given.judgement, findings=tuple(found)))


def probes(count, **parts):
    return [seen(f"probe-{i}", 1.2 + 0.2 * i, image=PHOTO, **parts) for i in range(count)]


M, S, N, I = Verdict.MEMORIZED, Verdict.SUSPICIOUS, Verdict.NO_EVIDENCE, Verdict.INCONCLUSIVE  # noqa: E741


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ((M, S, N), "1 of 3 probes memorized"),
        ((S, S, I), "2 of 3 probes suspicious"),
        ((N, N, I), "no evidence in 2 of 3 probes"),
        ((I, I, I), "no verdict"),
        ((M,), "1 of 1 probe memorized"),
    ],
)
def test_the_title_says_how_many_have_the_worst_verdict(verdicts, words):
    given = with_verdicts(report(*probes(len(verdicts))), *verdicts)
    assert headline(given) == f"Step 200: {words}"
    assert headline(replace(given, config=replace(given.config, max_train_steps=600))) == f"Step 200 of 600: {words}"


def test_the_second_line_says_what_the_controls_show_and_whether_training_stopped():
    calibrated = "20 held-out controls reach 1.2x at most; a probe can be called memorized from 1.5x on."
    assert measure(report(*probes(1), *controls(20, 1.25))) == calibrated
    stopped = measure(report(*probes(1), *controls(20, 1.25), stop="step 200: 1 probe(s) memorized"))
    assert stopped == f"memwatch stopped the training. {calibrated}"
    alone = measure(report(*probes(1)))
    assert alone == "No controls: a probe is suspicious from 2x on, and none is memorized."
    first = report(*probes(1, baseline=None), *controls(20, 1.0, baseline=None))
    assert measure(first) == "The controls were not compared with anything at this event."


def test_cards_come_in_the_order_of_the_history_and_the_worst_is_on_top(monkeypatch):
    shown = []

    def noted(finding, *rest):
        shown.append(finding.name)
        return card(finding, *rest)

    monkeypatch.setattr(memwatch.report.overview, "card", noted)
    given = with_verdicts(report(*probes(4), *controls(20, 1.0)), M, N, S, M)
    picture = overview_of(given)
    assert shown == [row.name for row in given.to_event().worst_first]
    assert shown == ["probe-3", "probe-0", "probe-2", "probe-1"]
    first = np.asarray(strip(given.findings[3], (GRID - 2 * EDGE) // 3, LETTERS))
    pixels = np.asarray(picture)[:, EDGE : EDGE + first.shape[1]]
    tops = [y for y in range(len(pixels) - len(first)) if np.array_equal(pixels[y : y + len(first)], first)]
    assert len(tops) == 1


def test_at_most_twelve_cards_and_the_rest_in_words(monkeypatch):
    shown = []
    monkeypatch.setattr(memwatch.report.overview, "card", lambda f, *rest: shown.append(f.name) or card(f, *rest))
    full, more = (report(*probes(count), *controls(20, 1.0)) for count in (CARDS, CARDS + 18))
    twelve, thirty = (overview_of(given) for given in (full, more))
    assert len(shown) == 2 * CARDS
    assert shown[CARDS:] == [row.name for row in more.to_event().worst_first[:CARDS]]
    assert thirty.height > twelve.height
    below = np.asarray(thirty)[twelve.height - EDGE :, EDGE : EDGE + GRID]  # the line that says how many more
    assert (below != 255).any()


def test_the_controls_are_beside_the_cards():
    given = report(*probes(2), *controls(20, 1.1))
    pixels = np.asarray(overview_of(given))[:, GRID + 2 * EDGE : GRID + 2 * EDGE + CHART]
    chart = np.asarray(band(given, {"probe-0", "probe-1"}, CHART, 420))
    tops = [y for y in range(len(pixels) - 420) if np.array_equal(pixels[y : y + 420], chart)]
    assert len(tops) == 1


@pytest.mark.parametrize(
    "observations",
    [
        [seen("a" * 60, image=PHOTO), *controls(20, 1.1)],
        [seen("a", image=PHOTO)],
        [seen("a"), seen("b", 1.2), *controls(20, 1.1)],
        [seen("a", image=PHOTO, baseline=None), *controls(20, 1.1, baseline=None)],
        [seen("a", image=PHOTO, now=measured(math.nan)), *controls(20, 1.1)],
        [seen("猫", reference=False, image=PHOTO), *controls(20, 1.1, reference=False)],
        [seen("a", image=PHOTO[:20]), seen("b"), seen("c", 1e9, image=PHOTO[:, :9]), *controls(20, 1.1)],
    ],
    ids=["long name", "no controls", "no images", "first event", "not finite", "prompt", "odd shapes"],
)
def test_awkward_events_are_drawn(observations):
    picture = overview_of(report(*observations))
    assert picture.width == WIDTH
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_an_event_that_failed_has_no_overview():
    assert overview_of(Report(200, load_config(None), Judgement(), True, 1.0, 0, None, failure="lost")) is None


def test_a_card_shows_the_nearest_generation_and_how_many_copy():
    given = report(seen("a", image=PHOTO), *controls(20, 1.0))
    drawn = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 200)])
    proved = replace(given.findings[0], proof=Proof(drawn, (0.9, 0.1, 0.2), ((),) * 3, 3))
    ((picture, caption),) = generation(proved, 64)
    assert (picture.size, picture.getpixel((0, 0)), caption) == ((64, 64), (90, 90, 90), "2 of 3 copy it")
    flat = replace(proved, proof=Proof(drawn, (math.inf,) * 3, ((),) * 3, 3))
    assert generation(flat, 64)[0][1] == "generated now"
    assert generation(given.findings[0], 64) == []


def test_a_card_without_image_is_its_strip():
    given = report(seen("a"), *controls(20, 1.0))
    shown = card(given.findings[0], 500, 2, 6.0)
    assert np.array_equal(np.asarray(shown), np.asarray(strip(given.findings[0], 500, LETTERS)))
