"""Simulated curves of several shapes: what a forecast by a straight line is worth where the curve is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from memwatch.judge.forecast import LEAST, WINDOW, forecast

LEVEL = 0.4  # a log factor, 1.5x
NOISE = 0.03  # of one event, about what the runs show
EVENTS = 200  # none of the shapes takes as many
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "straight": lambda n: 0.025 * n,
    "slowing down": lambda n: 0.6 * (1 - np.exp(-n / 14)),
    "speeding up, with the square": lambda n: 0.0016 * n**2,
    "speeding up, exponentially": lambda n: 0.02 * np.exp(n / 5),
}


def held(shape: str, window: int = WINDOW, runs: int = 300, seed: int = 0) -> Iterator[bool | None]:
    """For each run and event before the crossing: whether the forecast's interval held it; ``None`` for no forecast.

    All shapes cross the level at the 14th to 17th event. Noise is normal and independent.
    """
    rng, events = np.random.default_rng(seed), np.arange(EVENTS)
    mean = SHAPES[shape](events + 1.0)
    for _ in range(runs):
        values = mean + rng.normal(0, NOISE, EVENTS)
        crossing = int(np.argmax(values >= LEVEL))
        for n in range(LEAST, crossing + 1):
            said = forecast(events[:n].tolist(), values[:n].tolist(), LEVEL, window=window)
            ends = said is not None and (said.low, said.high if said.high is not None else np.inf)
            yield bool(ends[0] <= crossing and ends[1] > crossing - 1) if ends else None


def shape_row(shape: str) -> dict[str, Any]:
    """A line of the table."""
    found = list(held(shape))
    made = [one for one in found if one is not None]
    return {"curve": shape, "asked": len(found), "made": len(made), "share inside": sum(made) / len(made)}
