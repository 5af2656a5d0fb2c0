"""Intervals: 95 % ones, over items and over the runs that they come from. Items of one run are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import beta, t

LEVEL = 0.95
RESAMPLES = 1000

Groups = Sequence[Sequence[float]]  # of each run, its items' values


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: ``None`` where nothing was counted.
        low, high: of the interval. count: of values.
    """

    value: float | None
    low: float = 0.0
    high: float = 1.0
    count: int = 0

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


def share(groups: Sequence[Sequence[bool]]) -> Estimate:
    """A proportion: Clopper-Pearson on as many items as would be worth the same if all were independent.

    >>> str(share([[True] * 10, [True] * 10]))
    '1.000 [0.83, 1.00]'
    """
    values = [value for group in groups for value in group]
    if not values:
        return Estimate(None)
    n = len(values) / design_effect(groups)
    low, high = exact_interval(n * float(np.mean(values)), n)
    return Estimate(float(np.mean(values)), low, high, len(values))


def design_effect(groups: Groups) -> float:
    """By how much runs that differ inflate the variance of a mean over items (Kish): ``1 + (m - 1) rho``, at least 1.

    rho is the intraclass correlation by one-way analysis of variance, m the mean size of a group.
    """
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    sizes = np.array([len(group) for group in filled])
    n, k = int(sizes.sum()), len(filled)
    if k < 2 or n <= k:
        return 1.0
    grand = np.concatenate(filled).mean()
    between = sum(len(g) * (g.mean() - grand) ** 2 for g in filled) / (k - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in filled) / (n - k)
    m = (n - (sizes**2).sum() / n) / (k - 1)
    total = between + (m - 1) * within
    rho = float(np.clip((between - within) / total, 0, 1)) if total > 0 else 0.0
    return 1 + (n / k - 1) * rho


def mean(groups: Groups) -> Estimate:
    """A mean of numbers in [0, 1]: the wider of a bootstrap of runs and items, and of Student's t on items.

    The t counts as many items as would be worth the same if all were independent, and has the degrees of freedom of the
    runs. One item says nothing of others.
    """
    found = bootstrap(groups, lambda drawn: float(np.mean(np.concatenate(drawn))))
    if found.value is None or found.count < 2:
        return replace(found, low=0.0, high=1.0)
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    n = max(2.0, found.count / design_effect(groups))
    runs = sum(len(group) > 0 for group in groups)
    freedom = min(n, runs if runs > 1 else n) - 1
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * float(values.std(ddof=1)) / math.sqrt(n)
    low, high = min(found.low, found.value - half), max(found.high, found.value + half)
    return replace(found, low=max(0.0, low), high=min(1.0, high))


def at_least_exact(value: float, low: float, high: float, count: int) -> Estimate:
    """A number in [0, 1] whose interval is no narrower than that of a share of so many independent items."""
    exact = exact_interval(value * count, count)
    return Estimate(value, min(low, exact[0]), max(high, exact[1]), count)


def exact_interval(k: float, n: float) -> tuple[float, float]:
    """Clopper and Pearson 1934: of ``k`` of ``n``, which need not be whole numbers."""
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    return low, float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0


def median(groups: Groups) -> Estimate:
    """A median: bootstrap of runs, and of the items within each."""
    return bootstrap(groups, lambda drawn: float(np.median(np.concatenate(drawn))))


def bootstrap(groups: Groups, statistic: Callable[[list[np.ndarray]], float]) -> Estimate:
    """Any statistic of groups: runs are drawn with replacement, then items within each drawn run."""
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return Estimate(None)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        runs = [filled[int(i)] for i in rng.integers(len(filled), size=len(filled))]
        drawn.append(statistic([run[rng.integers(len(run), size=len(run))] for run in runs]))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(statistic(filled), float(low), float(high), sum(map(len, filled)))
