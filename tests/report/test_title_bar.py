"""Strips: the verdict as colour and word, the effect in words, letters that can be read in a small picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import ImageColor
from support.observations import controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.verdict import Verdict
from memwatch.report.title_bar import VERDICT_COLOURS, contrast, fitting, font_of, in_words, ink_on, strip, wrapped


def finding(observation, *others):
    return judge_event([observation, *others], {}, 1, load_config(None)).findings[0]


def test_contrast_by_hand():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#777777") == 1
    assert contrast("#FFFFFF", "#FF0000") == pytest.approx(1.05 / (0.2126 + 0.05), rel=1e-6)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_can_be_read_on_its_colour(verdict):
    colour = VERDICT_COLOURS[verdict]
    assert contrast(ink_on(colour), colour) >= 4.5  # what the guidelines ask of text


def test_people_without_red_or_without_green_receptors_tell_the_verdicts_apart():
    """Viénot, Brettel and Mollon 1999: what a dichromat sees, as a projection of linear RGB."""
    without_red = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    without_green = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    shown = [(np.array(ImageColor.getrgb(colour)) / 255) ** 2.2 for colour in VERDICT_COLOURS.values()]
    for sees in (np.eye(3), without_red, without_green):
        seen_as = [np.clip(sees @ colour, 0, 1) ** (1 / 2.2) for colour in shown]
        apart = [np.abs(a - b).max() for a, b in itertools.combinations(seen_as[:3], 2)]
        assert min(apart) > 0.15
        assert min(np.abs(other - seen_as[3]).max() for other in seen_as[:3]) > 0.09  # the least: green without green


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([seen(), *controls(20, 1.0)], "2.7x less freedom, p = "),
        ([seen(fallen=1.0), *controls(20, 1.0)], "no less freedom, p = 1"),
        ([seen()], "2.7x less freedom, no controls"),
        ([seen(), *controls(3, 1.0)], "2.7x less freedom, too few controls"),
        ([seen(baseline=None), *controls(20, 1.0)], "nothing earlier to compare with"),
        ([seen(now=measured(float("nan"))), *controls(20, 1.0)], "the output is not finite"),
    ],
)
def test_the_effect_and_what_stands_in_its_way_in_words(given, expected):
    assert in_words(finding(*given)).startswith(expected)


@pytest.mark.parametrize(("fallen", "verdict"), [(5.0, Verdict.SUSPICIOUS), (1.0, Verdict.NO_EVIDENCE)])
def test_a_strip_carries_the_colour_of_its_verdict(fallen, verdict):
    pixels = np.asarray(strip(finding(seen(fallen=fallen), *controls(20, 1.0)), 800, 40, 100))
    assert pixels.shape == (2 * 56 + 13, 800, 3)
    for each, colour in VERDICT_COLOURS.items():
        share = (pixels == ImageColor.getrgb(colour)).all(-1).mean()
        assert (share > 0.03) == (each is verdict)


def test_the_step_is_left_out_where_it_is_not_given():
    found = finding(seen(), *controls(20, 1.0))
    with_step, without = (np.asarray(strip(found, 800, 40, step)) for step in (100, None))
    line = 56
    assert np.array_equal(with_step[:line], without[:line])
    assert not np.array_equal(with_step[line:], without[line:])


def test_a_text_shrinks_before_its_middle_is_cut_out():
    assert fitting("cat", 500, 40) == ("cat", font_of(40))
    long = "a-probe-with-a-name-of-many-words"
    width = font_of(40).getlength(long)
    text, font = fitting(long, 0.9 * width, 40)
    assert text == long
    assert font.size < 40
    text, font = fitting(long, 0.4 * width, 40)
    assert font.size == 28
    assert font.getlength(text) <= 0.4 * width
    first, _, last = text.partition("…")
    assert long.startswith(first)
    assert long.endswith(last)
    assert abs(len(first) - len(last)) <= 1
    assert font.getlength(f"{first}{long[len(first)]}…{last}") > 0.4 * width


def test_lines_break_between_words():
    text = "a probe can be called memorized from 1.5x on"
    lines = wrapped(text, 200, 24)
    assert " ".join(lines) == text
    assert len(lines) > 1
    assert all(font_of(24).getlength(line) <= 200 for line in lines)
    assert wrapped("incomprehensibilities", 20, 24) == ["incomprehensibilities"]
    assert wrapped("", 20, 24) == [""]
