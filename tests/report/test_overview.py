"""Overviews: what the headline says, which cards there are in which order, and the awkward events."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.observations import controls, measured, seen

import memwatch.report.overview
from memwatch.config_file import load_config
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.verdict import Verdict
from memwatch.measure.copies import Proof
from memwatch.report.overview import CARDS, EDGE, GRID, SMALL, WIDTH, card, headline, lines_of, measure, overview_of
from memwatch.report.report import Report

PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
M, S, N, I = Verdict  # noqa: E741


def report(*observations, stop=None, **settings):
    config = replace(load_config(None), **settings)
    calibrated = any(o.probe.is_control for o in observations)
    return Report(200, config, judge_event(observations, {}, 200, config), calibrated, 1.0, 0, stop)


def with_verdicts(given, *verdicts):
    found = [replace(f, state=replace(f.state, verdict=v)) for f, v in zip(given.findings, verdicts, strict=True)]
    return replace(given, judgement=replace(given.judgement, findings=tuple(found)))


def probes(count, **parts):
    return [seen(f"probe-{i}", 1.2 + 0.2 * i, image=PHOTO, **parts) for i in range(count)]


def top_of(picture, part) -> list[int]:
    """Where a part lies in a picture: the rows of its top, searched for at any column where cards begin."""
    whole, part = np.asarray(picture), np.asarray(part)
    lefts = [EDGE + i * (part.shape[1] + EDGE) for i in range(3)]
    tops = range(len(whole) - len(part) + 1)
    return [y for x in lefts for y in tops if np.array_equal(whole[y : y + len(part), x : x + part.shape[1]], part)]


def test_the_second_line_says_what_the_controls_show_and_whether_training_stopped():
    calibrated = "20 held-out controls reach 1.2x at most; a probe can be called memorized from 1.5x on."
    assert measure(report(*probes(1), *controls(20, 1.25))) == calibrated
    stopped = measure(report(*probes(1), *controls(20, 1.25), stop="step 200: 1 probe(s) memorized"))
    assert stopped == f"memwatch stopped the training. {calibrated}"
    assert measure(report(*probes(1))).startswith("There are no controls, so a probe can be called suspicious")
    first = report(*probes(1, baseline=None), *controls(20, 1.0, baseline=None))
    assert measure(first) == "The controls were not compared with anything at this event."


def test_the_worst_have_cards_and_the_others_are_named(monkeypatch):
    shown = []
    monkeypatch.setattr(memwatch.report.overview, "card", lambda f, *rest: shown.append(f.name) or card(f, *rest))
    given = with_verdicts(report(*probes(CARDS + 3), *controls(20, 1.0)), M, S, *[N] * (CARDS + 1))
    picture = overview_of(given)
    worst = given.to_event().worst_first
    assert shown == [row.name for row in worst[:CARDS]]
    assert shown[:2] == ["probe-0", "probe-1"]
    width = (GRID - 2 * EDGE) // 3
    first, second = (top_of(picture, card(given.findings[i], width, 2)) for i in (0, 1))
    assert (len(first), first) == (1, second)
    names = ", ".join(row.title for row in worst[CARDS:])
    words = headline(given)  # the first line
    assert top_of(picture, words) == [EDGE]
    assert top_of(picture, lines_of(f"3 more without evidence: {names}", GRID, SMALL))


@pytest.mark.parametrize(
    "observations",
    [
        [seen("a" * 60, image=PHOTO), *controls(20, 1.1)],
        [seen("a"), seen("b", 1.2), *controls(20, 1.1)],
        [seen("a", image=PHOTO, baseline=None), *controls(20, 1.1, baseline=None)],
        [seen("a", image=PHOTO, now=measured(math.nan)), *controls(20, 1.1)],
        [seen("猫", reference=False, image=PHOTO), *controls(20, 1.1, reference=False)],
        [seen("a", image=PHOTO[:20]), seen("b"), seen("c", 1e9, image=PHOTO[:, :9])],
    ],
    ids=["long name", "no images", "first event", "not finite", "prompt", "odd shapes"],
)
def test_awkward_events_are_drawn(observations):
    picture = overview_of(report(*observations))
    assert picture.width == WIDTH
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_an_event_that_failed_has_no_overview():
    assert overview_of(Report(200, load_config(None), Judgement(), True, 1.0, 0, None, failure="lost")) is None


def test_a_card_shows_the_nearest_generation():
    given = report(seen("a", image=PHOTO), *controls(20, 1.0))
    drawn = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 200)])
    proved = replace(given.findings[0], proof=Proof(drawn, (0.9, 0.1, 0.2), ((),) * 3, 3))
    pixels = np.asarray(card(proved, 616, 3))
    assert (pixels[-100, 420:600] == 90).all()
    assert (np.asarray(card(given.findings[0], 616, 3))[-100, 420:] == 255).all()
