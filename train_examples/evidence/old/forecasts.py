"""How well forecasts hold: asked at every event of finished runs, against what the curves then did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evidence.old.forecast_runs import COURSE, SEEDS, Course, forecast_run, forecast_set
from evidence.old.forecast_shapes import SHAPES, shape_row
from evidence.pages.markdown import PACKAGES, markdown_table
from evidence.worlds.items import Kind

from memwatch.judge.alerts import Verdict
from memwatch.judge.forecast import LEAST, REACH, WINDOW, Forecast, forecast
from memwatch.report.about import machine
from memwatch.report.forecasts import curves
from memwatch.report.history import Run

AHEAD = ((1, 1), (2, 3), (4, 6), (7, 99))  # events, by which the table is divided
WINDOWS, REACHES = (4, 6, 8, 99), (0.5, 1.0, 2.0, math.inf)
CONFIDENCE = 0.9
CHOSEN_ON = ("forecast-0", "forecast-1", "forecast-2")  # window and reach were
NOT_STORED = (Kind.ORDINARY, Kind.HELD_OUT)
PAGE = Path(__file__).with_name("forecasts.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Watched:
    """One probe's curve over a whole run.

    Attributes:
        steps, values: one per event, see ``memwatch.report.forecasts.strength``.
        crossing: index of the first event at or above the level; ``None`` where there is none.
        memorized: step at which memwatch first called it memorized; ``None`` where it did not.
    """

    run: str
    name: str
    kind: Kind
    steps: Sequence[float]
    values: Sequence[float]
    crossing: int | None
    memorized: int | None


@dataclass(frozen=True)
class Asked:
    """A forecast that was asked for at one event, before the curve crossed the level.

    Attributes:
        event: index of the last event that was known.
        said: ``None`` where there was nothing to say.
    """

    watched: Watched
    event: int
    said: Forecast | None

    @property
    def ahead(self) -> int:
        """Events until the crossing, of a curve that has one."""
        assert self.watched.crossing is not None
        return self.watched.crossing - self.event

    @property
    def holds(self) -> bool:
        """Whether the interval holds the crossing, which was between the event that shows it and the one before."""
        w, said = self.watched, self.said
        assert w.crossing is not None
        assert said is not None
        return said.low <= w.steps[w.crossing] and (said.high is None or said.high > w.steps[w.crossing - 1])

    @property
    def is_late(self) -> bool:
        """Whether the interval began only after the crossing."""
        assert self.watched.crossing is not None
        return self.said is not None and self.said.low > self.watched.steps[self.watched.crossing]

    @property
    def is_wrong(self) -> bool:
        """Whether the interval ended before the run did, of a curve that never crossed."""
        return self.said is not None and self.said.high is not None and self.said.high <= self.watched.steps[-1]


def watched_of(run: Run, seed: int, level: float) -> list[Watched]:
    """Every probe of a run.

    Args:
        level: the factor to cross.
    """
    kinds = {item.name: item.kind for item in forecast_set(seed)}
    first: dict[str, int] = {}
    for event in run.events:
        for row in event.rows:
            if row.verdict is Verdict.MEMORIZED:
                first.setdefault(row.name, event.step)
    found = []
    for name, (steps, values) in curves(run.events).items():
        crossing = next((i for i, value in enumerate(values) if value >= math.log(level)), None)
        found.append(Watched(run.folder.name, name, kinds[name], steps, values, crossing, first.get(name)))
    return found


def ask(watched: Watched, level: float, window: int = WINDOW, reach: float = REACH) -> Iterator[Asked]:
    """At every event before the crossing at which there are enough of them."""
    end = len(watched.steps) if watched.crossing is None else watched.crossing
    for n in range(LEAST, end + 1):
        steps, values = watched.steps[:n], watched.values[:n]
        said = forecast(steps, values, math.log(level), confidence=CONFIDENCE, window=window, reach=reach)
        yield Asked(watched, n - 1, said)


def row_of(asked: Sequence[Asked]) -> dict[str, Any]:
    """Forecasts of curves that cross: how often there was one, how often it held, how far it was off, in steps."""
    made = [one for one in asked if one.said is not None]
    errors = [_step(one) - one.watched.steps[one.watched.crossing or 0] for one in made]
    widths = [one.said.high - one.said.low for one in made if one.said is not None and one.said.high is not None]
    return {
        "asked": len(asked),
        "made": len(made),
        "inside": f"{sum(one.holds for one in made)}/{len(made)}",
        "share inside": sum(one.holds for one in made) / len(made) if made else None,
        "median error": round(median(map(abs, errors))) if errors else None,
        "too late by": round(median(errors)) if errors else None,
        "median width": round(median(widths)) if widths else None,
    }


def _step(asked: Asked) -> float:
    assert asked.said is not None
    return asked.said.step


def never_row(kind: str, watched: Sequence[Watched], level: float) -> dict[str, Any]:
    """Forecasts of curves that never cross."""
    asked = [one for w in watched for one in ask(w, level)]
    return {
        "kind": kind,
        "probes": len(watched),
        "asked": len(asked),
        "made": sum(one.said is not None for one in asked),
        "wrong": sum(one.is_wrong for one in asked),
    }


def choice_row(watched: Sequence[Watched], level: float, window: int, reach: float) -> dict[str, Any]:
    """The same curves, forecast with other settings."""
    asked = [one for w in watched for one in ask(w, level, window, reach)]
    quiet = [one for one in asked if one.watched.kind in NOT_STORED]
    return (
        {"window": "all" if window == WINDOWS[-1] else window, "reach": f"{reach:g}" if math.isfinite(reach) else "any"}
        | row_of([one for one in asked if one.watched.crossing is not None])
        | {"made of ordinary and held-out": f"{sum(one.said is not None for one in quiet)}/{len(quiet)}"}
    )


def page(watched: Sequence[Watched], course: Course, level: float, command: str) -> str:
    """The results page.

    Args:
        watched: of all runs.
        level: the factor to cross.
        command: that made them.
    """
    crossing = [w for w in watched if w.crossing is not None]
    asked = [one for w in crossing for one in ask(w, level)]
    missed = [one for one in asked if one.said is not None and not one.holds]
    first = [next(one for one in asked if one.watched is w and one.said is not None) for w in told_of(asked)]
    by_ahead = [
        {"events ahead": _range(low, high)} | row_of([one for one in asked if low <= one.ahead <= high])
        for low, high in AHEAD
    ]
    never = [w for w in watched if w.crossing is None]
    kinds = [(str(kind), [w for w in never if w.kind is kind]) for kind in Kind]
    return PAGE.format(
        command=command,
        machine=machine(*PACKAGES),
        runs=len({w.run for w in watched}),
        course=course,
        level=level,
        confidence=CONFIDENCE,
        least=LEAST,
        window=WINDOW,
        probes=len(watched),
        crossing=len(crossing),
        silent=len(crossing) - len(first),
        first=sum(one.holds for one in first),
        told=len(first),
        called=called_text(crossing),
        after=sum(one.is_late for one in missed),
        before=sum(not one.is_late for one in missed),
        ahead=markdown_table([*by_ahead, {"events ahead": "all"} | row_of(asked)]),
        never=markdown_table([never_row(kind, some, level) for kind, some in kinds if some]),
        windows=markdown_table([choice_row(watched, level, window, REACH) for window in WINDOWS]),
        reaches=markdown_table([choice_row(watched, level, WINDOW, reach) for reach in REACHES]),
        reach=REACH,
        later=held_text([one for one in asked if one.watched.run not in CHOSEN_ON]),
        shapes=markdown_table([shape_row(shape) for shape in SHAPES]),
    )


def told_of(asked: Sequence[Asked]) -> list[Watched]:
    """The probes of which there was any forecast, in their order."""
    found: list[Watched] = []
    for one in asked:
        if one.said is not None and all(one.watched is not w for w in found):
            found.append(one.watched)
    return found


def held_text(asked: Sequence[Asked]) -> str:
    """How many intervals held, of curves that cross."""
    made = [one for one in asked if one.said is not None]
    return f"{sum(one.holds for one in made)} of {len(made)} intervals held"


def called_text(crossing: Sequence[Watched]) -> str:
    """How the crossing of the curve stands to memwatch's own verdict."""
    called = [w for w in crossing if w.memorized is not None]
    if not called:
        return "None of them was called memorized."
    later = [(w.memorized or 0) - w.steps[w.crossing or 0] for w in called]
    return f"{len(called)} of them were called memorized, in the median {median(later):.0f} steps after the crossing."


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} or more" if high == AHEAD[-1][1] else f"{low} to {high}"


def write_forecasts(base: Path, runs: Path, folder: Path, level: float, command: str, course: Course = COURSE) -> Path:
    """Train the runs that are missing, and write ``forecast.md`` in ``folder``.

    Args:
        base: the tiny Stable Diffusion. runs: the folder of the runs.
        level: the factor to cross.
    """
    found = [w for seed in SEEDS for w in watched_of(forecast_run(seed, base, runs, course), seed, level)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "forecast.md"
    file.write_text(page(found, course, level, command), encoding="utf-8")
    return file
