"""95 % intervals over items and over the runs that they come from. Items of one run are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    n, tail = len(values) / design_effect(groups), (1 - LEVEL) / 2
    k = n * float(np.mean(values))
    low = float(beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
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
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    values = np.concatenate(filled) if filled else np.zeros(0)
    if len(values) < 2:
        return Estimate(float(values[0]), count=1) if len(values) else Estimate(None)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        runs = [filled[int(i)] for i in rng.integers(len(filled), size=len(filled))]
        drawn.append(np.concatenate([run[rng.integers(len(run), size=len(run))] for run in runs]).mean())
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n, value = max(2.0, len(values) / design_effect(groups)), float(values.mean())
    freedom = min(n, len(filled) if len(filled) > 1 else n) - 1
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(value, max(0.0, min(low, value - half)), min(1.0, max(high, value + half)), len(values))


def upper_bound(count: int, of: int, confidence: float = 0.95) -> float:
    """The largest rate that ``count`` of ``of`` leaves plausible, one-sided (Clopper & Pearson 1934).

    >>> round(upper_bound(0, 24), 3)
    0.117
    """
    return 1.0 if count >= of else float(beta.ppf(confidence, count + 1, of - count))
