"""Runs in which it is known what is stored, drawn at random and judged by memwatch's own statistic, many at once.

What the map that decides would have shown of every picture is drawn. Every event measures everything: the screen only
takes verdicts away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from scipy import ndimage, stats

from evidence.verdicts.intervals import upper_bound
from memwatch.judge.statistic import (
    p_value,
    scores,
    threshold,
    top_means,
)
from memwatch.judge.verdict import LASTING

TAILS = {  # of severities, on the log scale
    "normal": "normal",
    "t5": "heavy tails (t, 5 degrees of freedom)",
    "lognormal": "skewed (lognormal, sigma 0.5)",
}
OTHERS = {  # where else a tail may lie, or how else pictures may change
    "pixels": "the pixels of a picture are skewed, its mean is normal",
    "spot": "a tail at the small sizes only: skewed severities of one spot, 1/16 of a normal picture",
}
SPREAD = 0.15  # standard deviation of severities; log of a factor
STORED = (8.0, 5.0)  # deviations: two more probes, stored on a quarter of the picture from the middle of the run on
SHARED = 0.7  # of the variance of severities: the same all over one picture; the rest is smooth noise
SIDE = 8  # of a map, pixels
NORMAL = np.linspace(-8, 8, 8001)
STUDENT = np.sign(NORMAL) * stats.t.isf(stats.norm.sf(np.abs(NORMAL)), 5) / np.sqrt(5 / 3)  # unit variance
SKEW = 0.5  # sigma of the lognormal
SMOOTHING = ndimage.gaussian_filter1d(np.eye(SIDE), 1.0, mode="wrap")
SMOOTHING /= np.sqrt((SMOOTHING**2).sum(0))  # of independent pixels of unit variance it leaves unit variance


@dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
        controls, probes, events: numbers of them.
        autocorrelation: of one object's severities between events, in [0, 1].
        tail: distribution of severities, see ``TAILS``. other: see ``OTHERS``.
    """

    controls: int = 20
    probes: int = 8
    events: int = 20
    autocorrelation: float = 0.8
    tail: str = "normal"
    other: str = ""


def grid() -> list[tuple[int, int, int, float]]:
    """The 144 settings: controls, probes, events, autocorrelation."""
    return list(itertools.product((11, 20, 30, 50), (1, 8, 32), (5, 20, 50), (0.0, 0.5, 0.8, 1.0)))


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


def maps_of(cell: Cell, runs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Of many runs the maps of all pictures, log factors, event by event: ``(runs, objects, SIDE, SIDE)``.

    Objects are the probes of which nothing is stored, those that are stored (``STORED``), and the controls.
    """
    objects, rho = cell.probes + len(STORED) + cell.controls, np.float32(cell.autocorrelation)

    def fresh() -> tuple[np.ndarray, np.ndarray]:
        noise = rng.standard_normal((runs, objects, SIDE, SIDE), dtype=np.float32)
        whole = rng.standard_normal((runs, objects, 1, 1), dtype=np.float32)
        return whole, (SMOOTHING.T @ noise @ SMOOTHING).astype(np.float32)

    whole, pixels = fresh()
    for event in range(cell.events):
        if event and rho < 1:
            new, weight = fresh(), np.sqrt(1 - rho**2)
            whole, pixels = rho * whole + weight * new[0], rho * pixels + weight * new[1]
        own = drawn(whole, pixels, cell)
        if event >= cell.events // 2:
            for i, strength in enumerate(STORED, start=cell.probes):
                own[:, i, : SIDE // 2, : SIDE // 2] += strength
        yield SPREAD * own


def drawn(whole: np.ndarray, pixels: np.ndarray, cell: Cell) -> np.ndarray:
    """Severities of unit variance, from standard normal numbers for whole pictures and for their pixels."""
    tails = ("normal", "lognormal") if cell.other == "pixels" else (cell.tail, "normal")
    own = np.sqrt(SHARED) * shaped(whole, tails[0]) + np.sqrt(1 - SHARED) * shaped(pixels, tails[1])
    if cell.other == "spot":
        own[..., 2:4, 2:4] += shaped(pixels[..., :1, :1], "lognormal")
    return own


# --- the product ------------------------------------------------------------------------------------------------------


def judged(maps: Iterable[np.ndarray], cell: Cell) -> Iterator[np.ndarray]:
    """T of every probe, ``(runs, probes)``, event by event, as ``judge_event`` has it.

    Args:
        maps: of every event, see ``maps_of``; the last objects are the controls.
    """
    for found in maps:
        profiles = top_means(found)
        yield scores(profiles[:, : -cell.controls], profiles[:, -cell.controls :])


@dataclass(frozen=True)
class Called:
    """What a rule calls: of all runs.

    Attributes:
        alarmed: runs that called any probe of which nothing is stored.
        found: by strength (``STORED``), runs that called the probe that is stored, from the middle on.
        delay: events from then on until the strongest is called, mean over the runs that called it.
    """

    alarmed: int
    found: tuple[int, ...]
    delay: float


@dataclass(frozen=True)
class Outcome:
    """What came out of one setting: ``runs`` of them, judged by the rule, and by each event alone."""

    cell: Cell
    runs: int
    rule: Called
    at_once: Called

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of runs with a false alarm (Clopper & Pearson)."""
        low = 1 - upper_bound(self.runs - self.rule.alarmed, self.runs, 0.975)
        return low, upper_bound(self.rule.alarmed, self.runs, 0.975)

    def keeps(self, promised: float) -> bool:
        """Whether the promised rate is plausible."""
        return self.interval[0] <= promised


def called(score: np.ndarray, cell: Cell, rate: float) -> Called:
    """What scores T ``(events, runs, probes)`` call; the probes that are stored are no part of the promise.

    Of a call the least factor and ``max_p`` are left out: they would hide what the statistics do.
    """
    calls = p_value(score, cell.controls) <= threshold(rate, cell.probes * cell.events)
    false, late = calls[:, :, : cell.probes], calls[cell.events // 2 :, :, cell.probes :]
    strongest = late[:, :, 0]
    delays = strongest.argmax(0)[strongest.any(0)]
    found = tuple(int(count) for count in late.any(0).sum(0))
    return Called(int(false.any((0, 2)).sum()), found, float(delays.mean()) if len(delays) else float("nan"))


def lasting(score: np.ndarray) -> np.ndarray:
    """The mean of T at each event and the two before, as ``evidence_of`` takes it; before the first it is 0."""
    padded = np.concatenate([np.zeros_like(score[:1])] * (LASTING - 1) + [score])
    mean: np.ndarray = sum(padded[i : i + len(score)] for i in range(LASTING)) / LASTING
    return mean


def simulate(cell: Cell, runs: int, rate: float, seed: int = 0) -> Outcome:
    """Run one cell. Verdicts on what is not stored do not depend on what is, so that one run shows both."""
    maps = maps_of(cell, runs, np.random.default_rng([seed, crc32(repr(cell).encode())]))
    score = np.stack(list(judged(maps, cell)))
    return Outcome(cell, runs, called(lasting(score), cell, rate), called(score, cell, rate))
