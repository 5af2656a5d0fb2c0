"""Forecasts against the interval's definition, and against simulated curves whose future is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evidence.old.forecast_shapes import SHAPES, held
from scipy import optimize, stats

from memwatch.judge.forecast import WINDOW, forecast

FAR = {"reach": math.inf}
RISING = ([0, 20, 40, 60, 80], [0.02, 0.09, 0.11, 0.20, 0.24])


def twin(steps, values, level: float, confidence: float) -> tuple[float, float | None]:
    """The ends of where the level lies inside the line's prediction interval, found by search, without the algebra."""
    line = stats.linregress(steps, values)
    x, y, n = np.array(steps, float), np.array(values, float), len(steps)
    s = math.sqrt(((y - line.intercept - line.slope * x) ** 2).sum() / (n - 2))
    t = stats.t.ppf((1 + confidence) / 2, n - 2)

    def band(at: float, side: int) -> float:
        width = t * s * math.sqrt(1 + 1 / n + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
        return line.intercept + line.slope * at + side * width - level

    far = steps[-1] + 1e6
    low = optimize.brentq(lambda at: band(at, +1), x.mean(), far)
    return low, optimize.brentq(lambda at: band(at, -1), x.mean(), far) if band(far, -1) > 0 else None


def test_a_line_without_noise_crosses_where_it_does():
    found = forecast([0, 10, 20, 30], [0.0, 0.1, 0.2, 0.3], 0.4)
    assert (found.step, found.low, found.high) == pytest.approx((40, 40, 40))


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_the_interval_is_where_the_level_lies_inside_the_prediction_interval(seed, confidence):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.uniform(5, 30, 6))
    values = 0.003 * steps + rng.normal(0, 0.02, 6)
    found = forecast(steps, values, 0.9, confidence=confidence, **FAR)
    line = stats.linregress(steps, values)
    assert (found.low, found.high) == pytest.approx(twin(steps, values, 0.9, confidence))
    assert found.step == pytest.approx((0.9 - line.intercept) / line.slope)
    assert steps[-1] < found.low < found.step < found.high


def test_the_unit_of_steps_does_not_matter():
    steps, values = RISING
    by_step = forecast(steps, values, 0.4)
    by_exposure = forecast([3.7 * step + 5 for step in steps], values, 0.4)
    ends = [(3.7 * end + 5) for end in (by_step.step, by_step.low, by_step.high)]
    assert (by_exposure.step, by_exposure.low, by_exposure.high) == pytest.approx(ends)


def test_where_the_slope_is_significant_but_could_be_nothing_at_this_confidence_there_is_no_upper_end():
    steps, values = [0, 1, 2, 3, 4, 5], [0.0, 0.8, 0.6, 1.5, 0.9, 1.3]
    found = forecast(steps, values, 10, confidence=0.99, **FAR)
    low, high = twin(steps, values, 10, 0.99)
    assert found.high is high is None
    assert found.low == pytest.approx(low)
    assert forecast(steps, values, 10, confidence=0.9, **FAR).high is not None
    near = forecast(steps, values, 1.6, confidence=0.99)  # inside the prediction interval everywhere
    assert (near.low, near.high) == (pytest.approx(5), None)


def test_what_is_forecast_lies_after_the_last_event():
    found = forecast([0, 1, 2, 3, 4], [0.0, 0.12, 0.17, 0.33, 0.35], 0.36)
    assert 4 < found.low <= found.step < found.high
    assert math.ceil(found.low) == 5


@pytest.mark.parametrize(
    ("steps", "values", "why"),
    [
        ([0, 1, 2], [0, 0.1, 0.2], "three events"),
        ([], [], "none at all"),
        ([0, 1, 2, 3], [0, 0.1, 0.2, 0.5], "crossed"),
        ([0, 1, 2, 3, 4], [0, 0.1, 0.6, 0.2, 0.3], "crossed before, and came back"),
        ([0, 1, 2, 3], [0, 0.1, 0.2, 0.4], "crossed exactly"),
        ([0, 1, 2, 3], [0, 0.1, math.nan, 0.3], "not finite"),
        ([0, 1, 2, 3], [0, -math.inf, 0.2, 0.3], "not finite"),
        ([0, 1, 2, 3], [0.3, 0.2, 0.1, 0.0], "falls"),
        ([0, 1, 2, 3], [0.1, 0.1, 0.1, 0.1], "stays"),
        ([0, 1, 2, 3], [0.0, 0.3, 0.0, 0.3], "rises by no more than its scatter"),
        ([0, 1, 2, 2], [0, 0.1, 0.2, 0.3], "steps do not rise"),
        ([0, 1, 2, 3], [0.0, 0.05, 0.1, 0.15], "at step 8, farther ahead than the curve is long"),
        ([0, 1, 2, 3, 4, 5, 6, 7], [0.0, 0.09, 0.18, 0.27, 0.35, 0.36, 0.37, 0.375], None),
    ],
)
def test_when_there_is_nothing_to_say(steps, values, why):
    assert (forecast(steps, values, 0.4) is None) == (why is not None)


def test_a_curve_that_should_have_crossed_by_now_has_no_forecast():
    steps, bent = range(9), [0.0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.36, 0.399, 0.37]
    assert forecast(steps[:-1], bent[:-1], 0.4, window=9) is not None
    assert forecast(steps, bent, 0.4, window=9, confidence=0.5) is None
    assert forecast(steps, bent, 0.41, window=9, confidence=0.99).high > 8


def test_how_far_a_forecast_reaches_is_counted_from_the_first_event_not_from_the_lines():
    steps, values = list(range(11)), [0.02 * i for i in range(11)]
    assert forecast(steps, values, 0.4).step == pytest.approx(20)  # ten ahead after ten
    assert forecast(steps, values, 0.41) is None
    assert forecast(steps, values, 0.41, reach=1.1).step == pytest.approx(20.5)


def test_only_the_last_events_count():
    steps, values = list(range(4 + WINDOW)), [0.09] * 4 + [0.01 * i**1.1 for i in range(WINDOW)]
    assert forecast(steps, values, 0.1) == forecast(steps[4:], values[4:], 0.1) is not None


@pytest.mark.parametrize(
    "wrong",
    [{"confidence": 0}, {"confidence": 1.0}, {"max_p": 0.0}, {"max_p": 0.6}, {"least": 2}, {"window": 3}, {"reach": 0}],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}.*allowed"):
        forecast(*RISING, 0.4, **wrong)
    with pytest.raises(ValueError, match="4 steps and 3 values"):
        forecast([1, 2, 3, 4], [0.1, 0.2, 0.3], 0.4)


# --- simulated -------------------------------------------------------------------------------------------------------


def test_the_crossing_of_one_more_observation_is_inside_as_often_as_promised():
    """Monte Carlo: a curve whose next observation, wherever it is made, is off by the same noise."""
    rng, inside, runs = np.random.default_rng(0), 0, 4000
    steps = np.arange(8.0)
    for _ in range(runs):
        found = forecast(steps, 0.1 * steps + rng.normal(0, 0.04, 8), 2.0, confidence=0.9, **FAR)
        crossing = (2.0 - rng.normal(0, 0.04)) / 0.1
        inside += found.low <= crossing <= found.high
    assert inside / runs == pytest.approx(0.9, abs=0.015)  # three standard errors


@pytest.mark.parametrize("max_p", [0.05, 0.2])
def test_a_curve_that_only_scatters_has_a_forecast_as_often_as_chance_finds_a_slope(max_p):
    rng, runs = np.random.default_rng(2), 3000
    found = [forecast(range(6), rng.normal(0, 0.03, 6), 0.4, max_p=max_p, **FAR) is not None for _ in range(runs)]
    assert np.mean(found) == pytest.approx(max_p, abs=3 * math.sqrt(max_p * (1 - max_p) / runs))


def test_the_first_crossing_is_inside_as_promised_on_a_straight_line_and_less_often_on_one_that_bends():
    shares = {}
    for shape in SHAPES:
        made = [one for one in held(shape, runs=40) if one is not None]
        shares[shape] = np.mean(made)
    assert shares["straight"] == pytest.approx(0.95, abs=0.03)
    assert shares["slowing down"] == pytest.approx(0.87, abs=0.05)
    assert shares["speeding up, with the square"] == pytest.approx(0.93, abs=0.04)
    assert shares["speeding up, exponentially"] == pytest.approx(0.80, abs=0.06)  # known, and stated
