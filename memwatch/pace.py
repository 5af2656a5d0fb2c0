"""Pace: how often an event comes, so that memwatch takes no larger a share of training time than the user allows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memwatch.config import FULL_EVERY, MemWatchConfig
from memwatch.measure.measure import Passes

WARM_UP, TIMED = 2, 10  # first steps of a run that are not timed, and steps after them that are
HORIZON = 2000  # steps that a run is taken to have if its length is not known; a shorter one has at least MIN_EVENTS
OFTENEST, RAREST, NEVER_RARER = 25, 500, 1000  # steps between events; above RAREST with a warning
MIN_EVENTS = 4  # so that an alert is in time
CHOSEN = 0.25  # share of all curvature that an event with a screen is expected to measure where nothing is stored
FIRST_AT_MOST = 0.5  # share of the budget that may pay for the first event


@dataclass(frozen=True)
class Pace:
    """The choice.

    Attributes:
        every_steps: optimizer steps between events. overhead: the share of training time that they should take.
        within: whether the user allows that much.
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
        first: of the first event, spread over the whole run. event: of a later event, as expected.
        full: what an event takes besides that measures curvature on everything.
    """

    step: float
    first: float
    event: float
    full: float = 0.0

    @classmethod
    def of(cls, step: float, first: float, passes: Passes) -> Prices:
        """What events will cost, from the first one and its ``passes``: of the screen or, without a screen, all."""
        if not passes.screen:
            return cls(step, first, first)
        a_pass = first / passes.of_event()
        return cls(step, first, a_pass * passes.of_event(CHOSEN), a_pass * passes.full)


def choose_pace(prices: Prices, config: MemWatchConfig) -> Pace:
    """As many events as ``overhead`` allows: at most one per 25 steps, and at least one per 1,000.

    A run that is known to be shorter than 2,000 steps has at least 4. Then memwatch may take more than allowed.

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
    if horizon // every >= FULL_EVERY:
        event += prices.full / FULL_EVERY
        every = interval(event)
    return pace_of(every, event, prices, config)


def pace_of(every: int, event: float, prices: Prices, config: MemWatchConfig) -> Pace:
    """An event of ``event`` seconds every ``every`` steps."""
    overhead = (prices.first / (config.max_train_steps or HORIZON) + event / every) / prices.step
    return Pace(every, overhead, overhead <= config.overhead)


def rounded(steps: float) -> int:
    """Rounded up to a multiple of 5, from 100 on of 10, and from 1,000 on of 100.

    >>> [rounded(n) for n in (21.4, 133.3, 1001)]
    [25, 140, 1100]
    """
    unit = 5 if steps < 100 else 10 if steps < 1000 else 100
    return math.ceil(steps / unit) * unit


def planned_events(max_train_steps: int | None, every_steps: int | None) -> int | None:
    """How many events a run will have after its first; ``None`` if that is not known."""
    return max(1, max_train_steps // every_steps) if max_train_steps and every_steps else None


@dataclass
class Clock:
    """Times the loop's own steps, and memwatch between them.

    A step is all time of the loop between two new step numbers, however many batches, passes and calls it takes. The
    first number may come in the middle of a step, so the time up to the second is not a whole step.

    Attributes:
        trained: seconds of training so far, without memwatch. spent: seconds of memwatch. first: of the first event.
        steps: seconds of the first steps, until enough are timed.
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
        """The loop has come to the end of ``step`` or, if that is no new number, of a batch of the next step."""
        is_new = self._newest is None or step > self._newest
        is_timed = is_new and len(self.steps) < WARM_UP + TIMED
        if is_timed:
            synchronize()  # the GPU's unfinished work belongs to the step
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
        return 0.0 if self._arrived is None else self.now() - self._arrived

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a usual step; ``None`` until enough are timed."""
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
