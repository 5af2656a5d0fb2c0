"""Runs in which it is known what is stored, drawn at random and judged by memwatch's own screen and judge.

What the network would say of every picture is drawn, at one noise level. The smallest severity of an alert is left out,
because it would hide what the statistics do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch
from scipy import stats

from memwatch.config import AlertsConfig, LevelsConfig, MemWatchConfig, SignalsConfig
from memwatch.judge.findings import Judgement, judge_event
from memwatch.judge.screen import chosen, with_references
from memwatch.judge.statistic import Screened, upper_bound
from memwatch.judge.verdict import Verdict
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation
from memwatch.measure.probes import Probe
from memwatch.measure.signals import LOSS_FLOOR, RHO_FLOOR

TAILS = {  # of severities, on the log scale
    "normal": "normal",
    "t5": "heavy tails (t, 5 degrees of freedom)",
    "lognormal": "skewed (lognormal)",
}
SKEW = 0.5  # sigma of the lognormal
SPREAD = 0.15  # standard deviation of severities, of variance and loss alike; log of a factor
STORED = 8.0  # standard deviations of the controls: severity of a probe that is stored, on a quarter of the picture
STORED_ONE = "stored"
SHARED = 0.7  # of the variance of severities: the same all over one picture, the rest pixel by pixel
FALLS = {"": (0.0, 0.0), "variance": (1.0, 0.1), "both": (1.0, 1.0)}  # of variance and loss
SIDE = 8  # of a map, pixels
NORMAL = np.linspace(-8, 8, 8001)
STUDENT = np.sign(NORMAL) * stats.t.isf(stats.norm.sf(np.abs(NORMAL)), 5) / np.sqrt(5 / 3)  # unit variance
DRAWS = np.array([-0.002, 0.002])[:, None, None]  # by how much two noise draws differ, so that there is an error bar
NO_FLOOR = 1 + 1e-6


@dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
        controls, probes, events: numbers of them.
        autocorrelation: of one object's severities between events, in [0, 1].
        tail: distribution of severities; ``t5`` has heavy tails, ``lognormal`` (sigma 0.5) is skewed to the right.
        fall: what falls on every picture alike until the end of the run, see ``FALLS``; the model learns, stores none.
    """

    controls: int = 20
    probes: int = 8
    events: int = 20
    autocorrelation: float = 0.8
    tail: str = "normal"
    fall: str = ""


def cells() -> Iterator[Cell]:
    """The middle of everything, and what differs from it in one respect; the tails and the falls together as well."""
    yield Cell()
    yield from (Cell(controls=n) for n in (11, 50))
    yield from (Cell(probes=n) for n in (1, 32))
    yield from (Cell(autocorrelation=rho) for rho in (0.0, 1.0))
    yield from (Cell(tail=tail, fall=fall) for tail in TAILS for fall in FALLS if (tail, fall) != ("normal", ""))


# --- what the network would have said ---------------------------------------------------------------------------------


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


def log_factors(cell: Cell, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """By how much variance and loss of every picture have fallen, event by event: ``(2, objects, SIDE, SIDE)``.

    Objects are the probes, of which the first is stored from the middle of the run on, and the controls.
    """
    objects, rho = 1 + cell.probes + cell.controls, cell.autocorrelation

    def fresh() -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((2, objects, 1, 1)), rng.standard_normal((2, objects, SIDE, SIDE))

    whole, pixels = fresh()
    for event in range(cell.events):
        if event:
            whole, pixels = (
                rho * old + np.sqrt(1 - rho**2) * new for old, new in zip((whole, pixels), fresh(), strict=True)
            )
        own = np.sqrt(SHARED) * shaped(whole, cell.tail) + np.sqrt(1 - SHARED) * pixels
        common = np.array(FALLS[cell.fall]) * (event + 1) / cell.events
        if event >= cell.events // 2:
            own[:, 0, : SIDE // 2, : SIDE // 2] += STORED
        yield common[:, None, None, None] + SPREAD * own


def observation(probe: Probe, variance: np.ndarray, loss: np.ndarray, *, curvature: bool) -> Observation:
    """A picture whose retained variance and loss were 1 everywhere and have fallen by these log factors.

    Args:
        variance, loss: ``(SIDE, SIDE)``.
        curvature: False is what the screen sees: the loss, at the first of two noise draws.
    """
    draws = 2 if curvature else 1
    ones, zeros = torch.ones(1, draws, 1, SIDE, SIDE), torch.zeros(1, draws, 1, SIDE, SIDE)
    error = np.maximum((1 + LOSS_FLOOR) * np.exp(-(loss + DRAWS[:draws])) - LOSS_FLOOR, 0)
    epsilon = torch.from_numpy(np.sqrt(error)).float()[None, :, None]
    rho = torch.from_numpy((1 + RHO_FLOOR) * np.exp(-(variance + DRAWS)) - RHO_FLOOR).float()[None]
    return Observation(
        probe,
        (301.0,),
        now=Measurement(CurvatureMap(rho) if curvature else None, epsilon),
        baseline=Measurement(CurvatureMap(ones[:, :, 0]) if curvature else None, ones),
        baseline_step=0,
        eps=zeros,
    )


# --- the product ------------------------------------------------------------------------------------------------------


def config_of(rule: AlertsConfig) -> MemWatchConfig:
    """The shipped settings at one noise level and without a smallest effect."""
    return MemWatchConfig(
        levels=LevelsConfig(timesteps=(301,), draws=2),
        signals=SignalsConfig(smooth=1),
        alerts=replace(rule, min_severity=NO_FLOOR),
    )


def probes_of(cell: Cell) -> list[Probe]:
    """One that is stored, those of which nothing is, then controls."""
    names = [STORED_ONE, *(f"probe/{i}" for i in range(cell.probes))]
    controls = [Probe("", "drawn", name=f"control/{i}", is_control=True) for i in range(cell.controls)]
    return [*(Probe("", "drawn", name=name) for name in names), *controls]


def judgements(events: Iterable[np.ndarray], probes: Sequence[Probe], config: MemWatchConfig) -> Iterator[Judgement]:
    """One run, event by event, as ``screen.observe`` and ``judge_event`` have it.

    Args:
        events: see ``log_factors``.
    """
    judgement = Judgement()
    for number, (variance, loss) in enumerate(events, start=1):
        pictures = list(zip(probes, variance, loss, strict=True))
        screened = [observation(*picture, curvature=False) for picture in pictures]
        names = {p.name for p in probes} if config.is_full_event(number) else chosen(screened, config)
        measured = with_references(names, probes)
        full = {p.name: observation(p, v, s, curvature=True) for p, v, s in pictures if p.name in measured}
        seen, by_screen = [full.get(o.name, o) for o in screened], Screened(screened, frozenset(names))
        judgement = judge_event(seen, judgement.states, number, config, screened=by_screen)
        yield judgement


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came out of one cell.

    Attributes:
        runs: how many were simulated.
        alarmed: those that called any probe of which nothing is stored.
        found: those that called the one that is stored from the middle of the run on.
        contradicted: those in which the rule called a control at any event.
        measured: share of curvature that was measured before anything was stored, full events left out.
    """

    cell: Cell
    runs: int
    alarmed: int
    found: int
    contradicted: int
    measured: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of runs with a false alarm (Clopper & Pearson)."""
        low = 1 - upper_bound(self.runs - self.alarmed, self.runs, 0.975)
        return low, upper_bound(self.alarmed, self.runs, 0.975)

    def keeps(self, promised: float) -> bool:
        """Whether the promised rate is plausible."""
        return self.interval[0] <= promised


def simulate(cell: Cell, runs: int, rule: AlertsConfig, seed: int = 0) -> Outcome:
    """Run one cell. Verdicts on what is not stored do not depend on what is, so that one run shows both."""
    config, probes = config_of(rule), probes_of(cell)
    alarmed = found = contradicted = 0
    shares = []
    for run in range(runs):
        rng = np.random.default_rng([seed, run, crc32(repr(cell).encode())])
        events = list(judgements(log_factors(cell, rng), probes, config))
        called = {f.name for j in events for f in j.findings if f.verdict is Verdict.MEMORIZED}
        alarmed += bool(called - {STORED_ONE})
        found += STORED_ONE in called
        contradicted += any(j.audit.called for j in events)
        quiet = enumerate(events[: cell.events // 2], start=1)
        shares += [j.num_measured / len(probes) for number, j in quiet if not config.is_full_event(number)]
    return Outcome(cell, runs, alarmed, found, contradicted, float(np.mean(shares)))
