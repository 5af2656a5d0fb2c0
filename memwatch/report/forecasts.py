"""Forecasts of a run: when each probe's curve will cross the alert level, from what ``history.jsonl`` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from memwatch.judge.forecast import Forecast, forecast
from memwatch.judge.verdict import Verdict
from memwatch.report.history import Event, Row, Run

Curve = tuple[list[float], list[float]]  # steps, and a log factor each


def strength(row: Row) -> float | None:
    """One number per event, whether it was screened or measured: the natural log of a factor, 0 is none.

    It is the mean over noise levels of the log of ``Row.levels``, which are the factors of the highest sixteenth of
    each level's map. It needs no region, and is no more than the severity of a region of that size. ``None`` where
    nothing was compared.
    """
    if not row.levels or not all(isinstance(level, int | float) and level > 0 for level in row.levels):
        return None  # what was not finite is null in the file
    return sum(map(math.log, row.levels)) / len(row.levels)


def curves(events: Sequence[Event]) -> dict[str, Curve]:
    """By probe, the events at which it was compared, oldest first."""
    found: dict[str, Curve] = {}
    for event in events:
        for row in event.rows:
            steps, values = found.setdefault(row.name, ([], []))
            if (value := strength(row)) is not None:
                steps.append(float(event.step))
                values.append(value)
    return found


def forecasts(events: Sequence[Event], level: float) -> dict[str, Forecast]:
    """By probe, when its curve will cross ``level``; only where there is something to say.

    What is memorized at the last event has no forecast, because the alert has come.

    Args:
        events: of a run, oldest first.
        level: the factor to cross, greater than 1: ``alerts.min_severity``.
    """
    memorized = {row.name for row in events[-1].rows if row.verdict is Verdict.MEMORIZED} if events else set()
    open_ = {name: curve for name, curve in curves(events).items() if name not in memorized}
    found = {name: forecast(steps, values, math.log(level)) for name, (steps, values) in open_.items()}
    return {name: one for name, one in found.items() if one is not None}


def ahead(run: Run) -> list[str]:
    """What the run's probes are heading for, one sentence each; none where nothing significant can be said."""
    level = run.about.settings.get("alerts", {}).get("min_severity")
    steps = [event.step for event in run.events]
    gaps = sorted(b - a for a, b in pairwise(steps) if b > a)
    if level is None or not gaps or run.stop is not None:
        return []
    every = gaps[len(gaps) // 2]
    return [f"{name} {forecast_text(one, every, level)}" for name, one in forecasts(run.events, level).items()]


def forecast_text(forecast: Forecast, every_steps: int, level: float) -> str:
    """A forecast in words; steps are those of the first event that would show the crossing.

    >>> forecast_text(Forecast(633.4, 512.0, 899.1), 20, 1.5)
    'crosses 1.5x at about step 640 (520 to 900)'
    """
    step, low = (math.ceil(value / every_steps) * every_steps for value in (forecast.step, forecast.low))
    until = "or later" if forecast.high is None else f"to {math.ceil(forecast.high / every_steps) * every_steps}"
    return f"crosses {level:g}x at about step {step} ({low} {until})"
