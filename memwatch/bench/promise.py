"""The promise, simulated: how often a run in which nothing is stored calls something memorized, and what it finds.

Severities are drawn instead of measured; everything after them is the product's own rule: p-values, the budget of a
run, patience, the check by ranks, the audit of the controls. The smallest effect that matters is left out, because it
would hide what the statistics do. All runs of a cell go through the rule side by side, event by event; a test holds
that against ``judge.alerts`` and ``judge.calibration``, which judge one object at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from memwatch.config import AlertsConfig
from memwatch.judge.alerts import RANK_P
from memwatch.judge.calibration import MIN_CONTROLS, NUM_SIZES, RESOLUTION, largest_p, upper_bound

CONTROLS, PROBES, EVENTS, AUTOCORRELATIONS = (10, 20, 50, 100), (1, 8, 64), (5, 20, 100), (0.0, 0.5, 0.8, 1.0)
TAILS = ("normal", "t5", "lognormal")  # of severities, on the log scale
SKEW = 0.5  # sigma of the lognormal
STORED = 8.0  # standard deviations of the controls: severity of a probe that is stored
SHARED = 0.7  # correlation of one object's severities at different sizes
NORMAL = np.linspace(-8, 8, 8001)
STUDENT = np.sign(NORMAL) * stats.t.isf(stats.norm.sf(np.abs(NORMAL)), 5) / np.sqrt(5 / 3)  # unit variance


@dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
        controls, probes, events: numbers of them.
        autocorrelation: of one object's severities between events, in [0, 1].
        tail: distribution of severities; ``t5`` has heavy tails, ``lognormal`` (sigma 0.5) is skewed to the right.
    """

    controls: int
    probes: int
    events: int
    autocorrelation: float
    tail: str = "normal"


def cells() -> Iterator[Cell]:
    """Every combination."""
    return (Cell(*c) for c in product(CONTROLS, PROBES, EVENTS, AUTOCORRELATIONS, TAILS))


# --- severities -------------------------------------------------------------------------------------------------------


def shaped(z: np.ndarray, tail: str) -> np.ndarray:
    """Standard normal numbers -> the distribution of that name, with mean 0 and variance 1."""
    if tail == "t5":
        heavy: np.ndarray = np.interp(z, NORMAL, STUDENT)
        return heavy
    if tail == "lognormal":
        mean, variance = np.exp(SKEW**2 / 2), np.exp(SKEW**2) * (np.exp(SKEW**2) - 1)
        skewed: np.ndarray = (np.exp(SKEW * z) - mean) / np.sqrt(variance)
        return skewed
    return z


def severities(cell: Cell, runs: int, rng: np.random.Generator, stored: float = STORED) -> Iterator[np.ndarray]:
    """Of all objects, event by event: ``(NUM_SIZES, objects, runs)``, in standard deviations of the controls.

    Objects are the probes, of which none is stored; then the first probe again, as it would be if it were stored from
    the middle of the run on; then the controls.
    """
    shape, rho = (cell.probes + cell.controls, runs), cell.autocorrelation

    def fresh() -> np.ndarray:
        own: np.ndarray = rng.standard_normal((NUM_SIZES, *shape))
        own *= np.sqrt(1 - SHARED)
        own += np.sqrt(SHARED) * rng.standard_normal(shape)
        return own

    z = fresh()
    for event in range(cell.events):
        if event and rho < 1:
            z = rho * z + np.sqrt(1 - rho**2) * fresh()
        x = shaped(z, cell.tail)
        again = x[:, :1] + (stored if event >= cell.events // 2 else 0.0)
        yield np.concatenate([x[:, : cell.probes], again, x[:, cell.probes :]], axis=1)


# --- the rule ---------------------------------------------------------------------------------------------------------


def excess_of(x: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """``calibration.Null.excess`` of every object: ``(NUM_SIZES, objects, runs)``.

    Args:
        x: ``(NUM_SIZES, objects, runs)``. controls: ``(NUM_SIZES, N, runs)``.
    """
    spread = controls.std(1, ddof=1, keepdims=True) * np.sqrt(1 + 1 / controls.shape[1])
    excess: np.ndarray = (x - controls.mean(1, keepdims=True)) / np.maximum(spread, RESOLUTION)
    return excess


def excess_over_others(controls: np.ndarray) -> np.ndarray:
    """The same of every control against the others, ``(NUM_SIZES, N, runs)``, without a loop over controls.

    With mean m and sum of squared deviations Q of all N, those without the i-th have the mean ``(N m - x_i) / (N - 1)``
    and the sum ``Q - (x_i - m)^2 N / (N - 1)``.
    """
    n = controls.shape[1]
    away = controls - controls.mean(1, keepdims=True)
    squares = np.square(away)
    left = np.maximum(squares.sum(1, keepdims=True) - squares * (n / (n - 1)), 0)
    spread = np.sqrt(left * ((1 + 1 / (n - 1)) / (n - 2)))
    excess: np.ndarray = away * (n / (n - 1)) / np.maximum(spread, RESOLUTION)
    return excess


class Group:
    """Objects of one kind in all runs, with their patience.

    Args:
        references: controls that each of them is compared with.
        probes: that share a run's budget.
    """

    def __init__(self, references: int, probes: int, rule: AlertsConfig) -> None:
        self.references, self.probes, self.rule = references, probes, rule
        self.streak: np.ndarray | int = 0

    def p_of(self, excess: np.ndarray) -> np.ndarray:
        """``calibration.Null.p_value``."""
        p: np.ndarray = np.minimum(1.0, NUM_SIZES * stats.t.sf(excess, self.references - 1))
        return p

    def smallest_excess(self, p: float) -> float:
        """What a p-value of ``p`` or less takes; it falls with the excess."""
        return float(stats.t.isf(p / NUM_SIZES, self.references - 1)) if p < 1 else -np.inf

    def allowed(self, event: int) -> float:
        """The p-value that the n-th event may have at most."""
        budget = self.rule.false_alarms_per_run
        return min(self.rule.max_p, largest_p(event, false_alarms_per_run=budget, num_probes=self.probes))

    def judge(self, event: int, x: np.ndarray, excess: np.ndarray, controls: np.ndarray) -> np.ndarray:
        """Whether the rule calls an object memorized at its n-th event, n = 1, 2, ...: bool ``(objects, runs)``.

        Args:
            x, excess: ``(NUM_SIZES, objects, runs)``.
            controls: ``(NUM_SIZES, N, runs)``; N is one more than ``references`` where they are the objects themselves.
        """
        highest = excess.max(0)
        self.streak = np.where(highest >= self.smallest_excess(self.rule.max_p), self.streak + 1, 0)
        passes = (highest >= self.smallest_excess(self.allowed(event))) & (self.streak >= self.rule.patience)
        objects, runs = np.nonzero(passes)  # few, where nothing is stored
        size = excess[:, objects, runs].argmax(0)
        own = controls.shape[1] - self.references
        as_high = (controls[size, :, runs] >= x[size, objects, runs][:, None]).sum(1) - own
        rank_p = (1 + as_high) / (1 + self.references)
        passes[objects, runs] = rank_p <= max(RANK_P, 1 / (1 + self.references))
        return np.asarray(passes)


class AuditOfRuns:
    """``judge.audit`` of all runs: the rule on every control against the others, as far as those are enough.

    Attributes:
        called: controls that were called so far, bool ``(N, runs)``.
        rarest_p: the smallest p-value at which a control was called so far, ``(runs,)``.
    """

    def __init__(self, cell: Cell, runs: int, rule: AlertsConfig) -> None:
        others = cell.controls - 1
        self._group = Group(others, cell.probes, rule) if others >= MIN_CONTROLS else None
        self.called = np.zeros((cell.controls, runs), dtype=bool)
        self.rarest_p = np.ones(runs)

    def judge(self, event: int, controls: np.ndarray) -> None:
        """Take in the n-th event. ``controls``: ``(NUM_SIZES, N, runs)``."""
        if self._group is None:
            return
        excess = excess_over_others(controls)
        now = self._group.judge(event, controls, excess, controls)
        self.called |= now
        objects, runs = np.nonzero(now)
        np.minimum.at(self.rarest_p, runs, self._group.p_of(excess[:, objects, runs].max(0)))


def calls(events: Iterable[np.ndarray], cell: Cell, rule: AlertsConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the rule says, event by event.

    Args:
        events: see ``severities``.

    Yields:
        Which of the probes and the stored one are called memorized, bool ``(probes + 1, runs)``, and in which runs the
        audit contradicts the promise, bool ``(runs,)``.
    """
    group, audit = Group(cell.controls, cell.probes, rule), None
    for event, x in enumerate(events, start=1):
        audit = audit or AuditOfRuns(cell, x.shape[-1], rule)
        watched, controls = x[:, : cell.probes + 1], x[:, cell.probes + 1 :]
        audit.judge(event, controls)
        excess = excess_of(watched, controls)
        called = group.judge(event, watched, excess, controls)
        objects, runs = np.nonzero(called)
        called[objects, runs] = group.p_of(excess[:, objects, runs].max(0)) <= audit.rarest_p[runs] ** 2
        yield called, np.asarray(audit.called.any(0))


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came out of one cell.

    Attributes:
        runs: how many were simulated.
        alarmed: those that called any probe memorized, with nothing stored.
        found: those that called the stored probe, if one were stored from the middle of the run on.
        contradicted: those whose audit contradicted the promise at any event.
    """

    cell: Cell
    runs: int
    alarmed: int
    found: int
    contradicted: int

    @property
    def rate(self) -> float:
        """Share of runs with a false alarm."""
        return self.alarmed / self.runs

    @property
    def power(self) -> float:
        """Share of runs that find what is stored."""
        return self.found / self.runs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``rate`` (Clopper & Pearson)."""
        low = 1 - upper_bound(self.runs - self.alarmed, self.runs, 0.975)
        return low, upper_bound(self.alarmed, self.runs, 0.975)

    def keeps(self, promised: float) -> bool:
        """Whether the promised rate is plausible."""
        return self.interval[0] <= promised


def simulate(cell: Cell, runs: int, rule: AlertsConfig, seed: int = 0, stored: float = STORED) -> Outcome:
    """Run one cell.

    Args:
        stored: severity of the stored probe, in standard deviations of the controls.
    """
    key = [cell.controls, cell.probes, cell.events, round(100 * cell.autocorrelation), TAILS.index(cell.tail)]
    alarmed, found, contradicted = (np.zeros(runs, dtype=bool) for _ in range(3))
    drawn = severities(cell, runs, np.random.default_rng([seed, *key]), stored)
    for event, (called, against) in enumerate(calls(drawn, cell, rule)):
        alarmed |= called[: cell.probes].any(0)
        contradicted |= against
        if event >= cell.events // 2:
            found |= called[cell.probes]
    return Outcome(cell, runs, int(alarmed.sum()), int(found.sum()), int(contradicted.sum()))
