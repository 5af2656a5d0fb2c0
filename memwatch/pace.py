"""Pace: how often memwatch looks, so that it takes no larger a share of training time than the user allows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memwatch.config import MemWatchConfig
from memwatch.measure.measure import Passes

WARM_UP, TIMED = 2, 10  # of a run's first steps: how many are passed over, and how many are timed then
HORIZON = 2000  # steps from which on a run can pay for its events, and over which it does if its length is not known
OFTENEST, RAREST = 25, 500  # steps between events that are chosen without a word
NEVER_RARER = 1000
MIN_EVENTS = 4  # of a shorter run: an alert takes two, and it should be in time
CHOSEN = 0.25  # of all curvature, what an event with a screen is expected to measure where nothing is stored
FIRST_AT_MOST = 0.5  # share of the budget that may pay off the first event; the rest is for the others


@dataclass(frozen=True)
class Pace:
    """The choice.

    Attributes:
        every_steps: optimizer steps between events.
        overhead: the share of training time that this is expected to take.
        within: whether that is what the user allows.
    """

    every_steps: int
    overhead: float
    within: bool

    def __str__(self) -> str:
        return f"an event every {self.every_steps} steps, about {100 * self.overhead:.1f} % of training time"


@dataclass(frozen=True)
class Prices:
    """Seconds of one rank.

    Attributes:
        step: of one optimizer step of the loop.
        first: of the first event, which is paid off over the whole run.
        event: of a later one, as it is to be expected.
        full: of one that measures curvature on everything, besides.
    """

    step: float
    first: float
    event: float
    full: float = 0.0

    @classmethod
    def of(cls, step: float, first: float, passes: Passes) -> Prices:
        """What events will cost, judged by the first, which ran the screen alone, or without a screen everything.

        Args:
            passes: of one event.
        """
        if not passes.screen:
            return cls(step, first, first)
        a_pass = first / passes.of_event()
        return cls(step, first, a_pass * passes.of_event(CHOSEN), a_pass * passes.full)


def choose_pace(prices: Prices, config: MemWatchConfig) -> Pace:
    """As many events as ``overhead`` allows, within bounds.

    Never more often than every 25 steps. Rarer than every 500 where it must be, but never rarer than every 1,000; and a
    run that is known to be shorter than 2,000 steps has 4 events at least. Then more is spent than allowed.

    >>> choose_pace(Prices(step=1.0, first=10.0, event=4.0), MemWatchConfig(overhead=0.02)).every_steps
    270
    """
    horizon = config.max_train_steps or HORIZON
    allowed = config.overhead * prices.step  # seconds per step
    left = allowed - min(prices.first / horizon, FIRST_AT_MOST * allowed)
    rarest = NEVER_RARER if horizon >= HORIZON else max(1, horizon // MIN_EVENTS)

    def interval(event: float) -> int:
        return min(rounded(max(OFTENEST, event / left)), rarest)

    event = prices.event
    every = interval(event)
    if horizon // every >= config.full_every:
        event += prices.full / config.full_every
        every = interval(event)
    return pace_of(every, event, prices, config)


def pace_of(every: int, event: float, prices: Prices, config: MemWatchConfig) -> Pace:
    """What an event of ``event`` seconds every ``every`` steps comes to."""
    overhead = (prices.first / (config.max_train_steps or HORIZON) + event / every) / prices.step
    return Pace(every, overhead, overhead <= config.overhead)


def rounded(steps: float) -> int:
    """Up to a number that people can read: a multiple of 5, from 100 on of 10, and from 1,000 on of 100.

    >>> [rounded(n) for n in (21.4, 133.3, 1001)]
    [25, 140, 1100]
    """
    unit = 5 if steps < 100 else 10 if steps < 1000 else 100
    return math.ceil(steps / unit) * unit


def planned_events(max_train_steps: int | None, every_steps: int | None) -> int | None:
    """How many events a run will have after its first; ``None`` where that is not known."""
    return max(1, max_train_steps // every_steps) if max_train_steps and every_steps else None


@dataclass
class Clock:
    """Times the loop's own steps, and memwatch between them.

    A step is all time of the loop between two new step numbers, however many batches, passes and calls lie in between.
    The first number may come in the middle of a step, so the one that follows it ends no whole step, either.

    Attributes:
        trained: seconds of training so far, memwatch left out. spent: seconds of memwatch.
        first: seconds of the first event.
        steps: seconds per step of the first ones, until enough are timed.
    """

    trained: float = 0.0
    spent: float = 0.0
    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    now: Callable[[], float] = time.perf_counter
    _left: float | None = None  # when the loop went on
    _arrived: float | None = None
    _newest: int | None = None  # step number
    _ended: float | None = None  # ``trained`` when that came, where it was surely the end of a step

    def arrive(self, step: int) -> None:
        """The loop has come to the end of ``step``, or of a batch of the next one where the number is not new."""
        is_new = self._newest is None or step > self._newest
        is_timed = is_new and len(self.steps) < WARM_UP + TIMED
        if is_timed:
            synchronize()  # what a GPU has still to do belongs to the step
        self._arrived = self.now()
        self.trained += 0.0 if self._left is None else self._arrived - self._left
        if is_timed and self._newest is not None and self._ended is not None:
            self.steps.append((self.trained - self._ended) / (step - self._newest))
        if is_new:
            self._ended = None if self._newest is None else self.trained
            self._newest = step

    def leave(self) -> None:
        """The loop goes on."""
        self.spent, self._arrived = self.spent + self._here, None
        self._left = self.now()

    @property
    def _here(self) -> float:
        """Seconds since the loop arrived."""
        return 0.0 if self._arrived is None else self.now() - self._arrived

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a usual step; ``None`` until enough have been timed."""
        timed = self.steps[WARM_UP:]
        return statistics.median(timed) if len(timed) >= TIMED else None

    @property
    def overhead(self) -> float | None:
        """Share of training time that memwatch has taken so far; ``None`` before the first step."""
        return (self.spent + self._here) / self.trained if self.trained else None

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {"trained": self.trained, "spent": self.spent, "first": self.first}


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
