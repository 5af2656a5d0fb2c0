"""Regions: connected parts of a map of numbers. Thresholds are in the map's own unit; pictures play no part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats

PEAK = 0.98  # the quantile that stands for a map's peak, so that one odd pixel does not move it
NEIGHBOURS = np.ones((3, 3))
# Of a region that fills less than this share of the map, smoothing and the network's own reach make a hill without a
# plateau, whose foot lies outside. Only what reaches this share of its own peak, on the log scale, belongs to it.
SMALL, SMALL_RELATIVE = 0.15, 0.5


@dataclass(frozen=True)
class Region:
    """One connected part of a map above the threshold.

    Attributes:
        box: ``(left, top, right, bottom)`` in image pixels, right and bottom exclusive.
        area: share of the image, in (0, 1].
        mean: of the map inside the region, in the map's unit.
        effect, sem, low: the same mean estimated on noise draws that did not propose the region, its standard error,
            and its lower 97.5 % bound (Student's t); see ``estimate``.
        z_score, p, rank_p: against the controls, see ``calibration.Null``; ``None`` without enough controls.
        rank_p_peers: the rank p-value against ordinary training images; ``None`` without them.
        level: the timestep at which the region is strongest; ``None`` until ``findings`` has set it.
    """

    box: tuple[int, int, int, int]
    area: float
    mean: float
    effect: float
    sem: float
    low: float
    z_score: float | None = None
    p: float | None = None
    rank_p: float | None = None
    rank_p_peers: float | None = None
    level: float | None = None


def threshold_of(values: np.ndarray, min_factor: float, relative: float) -> float:
    """The value from which a pixel belongs to a region: the stricter of two rules.

    Args:
        values: a map of log factors, ``(h, w)``.
        min_factor: the factor that a pixel needs in any map.
        relative: the share of the map's own peak that it needs, on the log scale.
    """
    return max(math.log(min_factor), relative * float(np.quantile(values, PEAK)))


def components(values: np.ndarray, min_factor: float, relative: float, min_area: float = 0.0) -> Iterator[np.ndarray]:
    """The connected components (8 neighbours) of a map ``(h, w)`` above ``threshold_of``, as bool ``(h, w)``.

    A small component is cut once more, see ``SMALL``.

    Args:
        min_area: share of the map in [0, 1]; smaller components are dropped.
    """
    for inside in _connected(values >= threshold_of(values, min_factor, relative)):
        found = inside
        if inside.mean() < SMALL:
            steep = inside & (values >= SMALL_RELATIVE * np.quantile(values[inside], PEAK))
            found = max(_connected(steep), key=np.sum)
        if found.mean() >= min_area:
            yield found


def _connected(above: np.ndarray) -> Iterator[np.ndarray]:
    labels, count = ndimage.label(above, structure=NEIGHBOURS)
    return (labels == i for i in range(1, count + 1))


def estimate(samples: np.ndarray, inside: np.ndarray, min_factor: float, relative: float) -> tuple[float, float, float]:
    """How strong a region is: effect, its standard error, and its lower 97.5 % bound, from draws held apart.

    A region is found where noise is high as well, so its own mean flatters it. Each draw is therefore asked only about
    the region that the *other* draws propose: the component of their mean map that shares most with ``inside``. Where
    they propose none, the draw counts as 0. Which of their components that is still depends on all draws, so about a
    third of the flattery is left in maps of pure noise; there the controls decide, not this bound.

    Args:
        samples: one map per noise draw, ``(draws, h, w)``.
        inside: the region that all draws propose, bool ``(h, w)``.

    Returns:
        In the map's unit; the bound is of Student's t with ``draws - 1`` degrees of freedom, ``-inf`` with one draw.
    """
    n = len(samples)
    if n == 1:
        return float(samples[0][inside].mean()), math.inf, -math.inf
    total, effects = samples.sum(0), []
    for one in samples:
        proposed = list(components((total - one) / (n - 1), min_factor, relative))
        shared = [(int((other & inside).sum()), i) for i, other in enumerate(proposed)]
        most, i = max(shared, default=(0, 0))
        effects.append(float(one[proposed[i]].mean()) if most else 0.0)
    effect, sem = float(np.mean(effects)), float(np.std(effects, ddof=1) / math.sqrt(n))
    return effect, sem, effect - float(stats.t.ppf(0.975, n - 1)) * sem


def box_of(inside: np.ndarray, scale: int) -> tuple[int, int, int, int]:
    """``(left, top, right, bottom)`` of a bool map, times ``scale`` image pixels per map pixel."""
    rows, columns = np.nonzero(inside)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return int(left) * scale, int(top) * scale, int(right) * scale, int(bottom) * scale
