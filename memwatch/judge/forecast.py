"""Forecast: when a probe's own curve will cross the alert level, with an interval; nothing while it does not rise.

A straight line through the curve's last ``window`` events. Its next values scatter about it as the past ones do, so
that the step at which a *seen* value crosses the level is uncertain by the line and by that scatter (inverse
prediction, Fieller 1954): the interval holds the steps at which the level lies inside the line's prediction interval.

The line knows of no bend, so it is short and does not reach far ahead. Measured curves of the log factor are straight
or slow down, and intervals hold on them; one that speeds up fast crosses before some of its intervals begin
(``train_examples/results/forecast.md``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST, WINDOW = 4, 6  # events; a longer line holds less often on curves that bend (``memwatch bench --forecast``)
MAX_P = 0.05  # of the slope
REACH = 1.0  # farther ahead most forecasts are of curves that never cross


@dataclass(frozen=True)
class Forecast:
    """When a curve crosses a level, in the unit of its steps.

    Attributes:
        step: where the line does. low, high: the interval; ``high`` is ``None`` where it has no upper end. All of them
            lie after the curve's last event.
    """

    step: float
    low: float
    high: float | None


def forecast(
    steps: Sequence[float],
    values: Sequence[float],
    level: float,
    *,
    confidence: float = 0.9,
    max_p: float = MAX_P,
    least: int = LEAST,
    window: int = WINDOW,
    reach: float = REACH,
) -> Forecast | None:
    """When ``values`` will reach ``level``.

    ``None`` with fewer than ``least`` events, when the level was reached already, when a value is not finite or steps
    do not rise, when the slope is not significantly positive, when the crossing is too far ahead, and when the line
    should have crossed the level by now, so that it is not what the curve does.

    Args:
        steps: of the events, rising; optimizer steps or exposures.
        values: one per event, on the scale on which they rise about linearly (the log of a factor).
        level: on the same scale.
        confidence: of the interval, in (0, 1).
        max_p: largest p-value of the slope (one-sided t), in (0, 0.5].
        least: events that it takes, at least 3.
        window: events that the line goes through, the last ones, at least ``least``.
        reach: how far ahead the crossing may be, relative to the steps from the first event to the last; above 0.

    Raises:
        ValueError: as many values as steps are needed; an argument is out of its bounds.

    >>> forecast([0, 1, 2, 3], [0.0, 1.1, 1.9, 3.0], 5.0)
    Forecast(step=5.07..., low=4.57..., high=5.68...)
    """
    if len(steps) != len(values):
        raise ValueError(f"got {len(steps)} steps and {len(values)} values, allowed: one value per step")
    if not (0 < confidence < 1 and 0 < max_p <= 0.5 and 3 <= least <= window and reach > 0):
        got = f"confidence {confidence}, max_p {max_p}, least {least}, window {window}, reach {reach}"
        allowed = "a confidence in (0, 1), a max_p in (0, 0.5], 3 <= least <= window, and a reach above 0"
        raise ValueError(f"got {got}; allowed: {allowed}")
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    usable = len(x) >= least and np.isfinite(y).all() and (np.diff(x) > 0).all()
    if not usable or y.max() >= level:
        return None
    found = _crossing(x[-window:], y[-window:], level, confidence, max_p)
    return found if found is not None and found.step - x[-1] <= reach * (x[-1] - x[0]) else None


def _crossing(x: np.ndarray, y: np.ndarray, level: float, confidence: float, max_p: float) -> Forecast | None:
    """By least squares. With ``d`` the distance from the mean step, the interval is where

    ``(slope d - gap)^2 <= t^2 s^2 (1 + 1/n + d^2 / Sxx)``, a quadratic inequality in ``d``.
    """
    n, centre, after = len(x), float(x.mean()), math.nextafter(float(x[-1]), math.inf)
    away, gap = x - centre, level - float(y.mean())
    spread = float(away @ away)
    slope = float(away @ y) / spread
    residuals = y - y.mean() - slope * away
    scatter = float(residuals @ residuals) / (n - 2)
    if slope <= 0 or slope**2 <= stats.t.isf(max_p, n - 2) ** 2 * scatter / spread:
        return None
    allowed = float(stats.t.ppf((1 + confidence) / 2, n - 2)) ** 2 * scatter
    lead, near = slope**2 - allowed / spread, allowed * (1 + 1 / n)
    under = gap**2 * allowed / spread + lead * near
    if under < 0:  # the level lies inside the prediction interval everywhere
        return Forecast(max(centre + gap / slope, after), after, None)
    root = slope * gap + math.sqrt(under)
    low, high = centre + (gap**2 - near) / root, centre + root / lead if lead > 0 else None
    if high is not None and high < after:
        return None
    return Forecast(max(centre + gap / slope, after), max(low, after), high)
