"""Title bars: the verdict as colour and word, the effect and the reason in words, letters that can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import ImageColor
from support.browser import contrast
from support.observations import controls, measured, seen

from memwatch.config_file import load_config
from memwatch.judge.findings import judge_event
from memwatch.judge.verdict import Verdict
from memwatch.report.history import why
from memwatch.report.title_bar import (
    QUIET,
    VERDICT_COLOURS,
    fitting,
    font_of,
    ink_on,
    title_bar,
)


def finding(observation, *others):
    return judge_event([observation, *others], {}, 1, load_config(None)).findings[0]


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_can_be_read_on_its_colour(verdict):
    assert contrast(ink_on(verdict), VERDICT_COLOURS[verdict]) >= 4.5  # what the guidelines ask of text


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
        ([seen(fallen=1.0), *controls(20, 1.0)], "no less freedom, p = 1: "),
        ([seen()], "2.7x less freedom"),
        ([seen(baseline=None), *controls(20, 1.0)], "nothing earlier to compare with"),
        ([seen(now=measured(float("nan"))), *controls(20, 1.0)], "non-finite values in the model's output"),
    ],
)
def test_the_effect_or_why_there_is_none_in_words(given, expected):
    assert why(finding(*given)).startswith(expected)


@pytest.mark.parametrize(("fallen", "verdict"), [(5.0, Verdict.SUSPICIOUS), (1.0, Verdict.NO_EVIDENCE)])
def test_a_title_carries_the_colour_of_its_verdict_and_the_reason_of_it(fallen, verdict):
    found = finding(seen(fallen=fallen), *controls(20, 1.0))
    pixels = np.asarray(title_bar(found, 800, 40, 100))
    for each, colour in VERDICT_COLOURS.items():
        share = (pixels == ImageColor.getrgb(colour)).all(-1).mean()
        assert (share > 0.03) == (each is verdict)
    assert (pixels[2 * 56 :] == ImageColor.getrgb(QUIET)).all(-1).any()  # the third line
    first = finding(seen(baseline=None))  # all is said in the second line
    assert (np.asarray(title_bar(first, 800, 40))[2 * 56 :] == 255).all()
    assert pixels.shape == np.asarray(title_bar(first, 800, 40)).shape


def test_a_text_shrinks_before_its_middle_is_cut_out():
    assert fitting("cat", 500, 40) == ("cat", font_of(40))
    long = "a-probe-with-a-name-of-many-words"
    width = font_of(40).getlength(long)
    text, font = fitting(long, 0.9 * width, 40)
    assert (text, font.size < 40) == (long, True)
    text, font = fitting(long, 0.4 * width, 40)
    assert font.size == 28
    assert font.getlength(text) <= 0.4 * width
    first, _, last = text.partition("…")
    assert long.startswith(first)
    assert long.endswith(last)
    assert font.getlength(f"{first}{long[len(first)]}…{last}") > 0.4 * width
