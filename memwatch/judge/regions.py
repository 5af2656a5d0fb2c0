"""Regions: the connected parts of a map that stand out, and how strong each is. Colours play no part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats

from memwatch.judge.statistic import NUM_SIZES, Tail, mean_and_spread, p_value, sizes_of
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals

MIN_FACTOR = 1.1  # reduction factor that a pixel of a region reaches
RELATIVE = 0.35  # share of the map's own peak, on the log scale: a smooth edge lies in the middle of a slope
MIN_AREA = 1 / 64  # of the image: the smallest region, and the smallest size at which controls are compared
PEAK = 0.98  # the quantile that stands for a map's peak, so that one odd pixel does not move it
NEIGHBOURS = np.ones((3, 3))
# Smoothing and the network's reach turn a region below this share of the map into a hill without a plateau, whose foot
# lies outside. Only what reaches ``SMALL_RELATIVE`` of its own peak, on the log scale, belongs to it.
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
        z_score, p: of this region against the controls at its size; ``None`` without enough controls. The verdict rests
            on T of the whole map, see ``statistic.scores``.
    """

    box: tuple[int, int, int, int]
    area: float
    mean: float
    effect: float
    sem: float
    low: float
    z_score: float | None = None
    p: float | None = None


def threshold_of(values: np.ndarray) -> float:
    """From which value of a map of log factors ``(h, w)`` a pixel belongs to a region: the stricter of two rules."""
    return max(math.log(MIN_FACTOR), RELATIVE * float(np.quantile(values, PEAK)))


def components(values: np.ndarray, min_area: float = 0.0) -> Iterator[np.ndarray]:
    """The connected components (8 neighbours) of a map ``(h, w)`` above ``threshold_of``, as bool ``(h, w)``.

    A small component is cut once more, see ``SMALL``.

    Args:
        min_area: share of the map in [0, 1]; smaller components are dropped.
    """
    for inside in _connected(values >= threshold_of(values)):
        found = inside
        if inside.mean() < SMALL:
            steep = inside & (values >= SMALL_RELATIVE * np.quantile(values[inside], PEAK))
            found = max(_connected(steep), key=np.sum)
        if found.mean() >= min_area:
            yield found


def _connected(above: np.ndarray) -> Iterator[np.ndarray]:
    labels, count = ndimage.label(above, structure=NEIGHBOURS)
    return (labels == i for i in range(1, count + 1))


def estimate(samples: np.ndarray, inside: np.ndarray) -> tuple[float, float, float]:
    """How strong a region is: effect, its standard error, and its lower 97.5 % bound, from draws held apart.

    Noise helps to propose a region, so the mean inside it is too high. Each draw is therefore averaged over the region
    that the *other* draws propose: the component of their mean map that shares most with ``inside``. Where they propose
    none, the draw counts as 0. The choice of that component still depends on all draws, so about a third of the bias is
    left in maps of pure noise; there the controls decide, not this bound.

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
        proposed = list(components((total - one) / (n - 1)))
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


# --- all regions of a map ---


def size_index(num_pixels: int, of: int) -> int:
    """Which of ``sizes_of`` a region is compared at: the largest that is not larger than the region.

    Controls have higher means at a smaller size, so rounding down never favours the region.
    """
    return next((i for i, size in enumerate(sizes_of(of)) if size <= num_pixels), NUM_SIZES - 1)


def regions_of(
    observation: Observation, signals: Signals | None, controls: np.ndarray | None, tail: Tail | None = None
) -> tuple[tuple[Region, ...], np.ndarray | None]:
    """The regions of the map that decides, and their labels ``(h, w)``.

    The first region exceeds the controls most or, without controls, is the strongest.

    Args:
        controls: profiles of the controls, ``(N, 7)``; ``None`` where there are too few. tail: of their own scores.
    """
    if signals is None or signals.decisive is None:
        return (), None
    samples = signals.decisive.samples.double().numpy()
    mean = samples.mean(0)
    scale = observation.image.shape[0] // mean.shape[0] if observation.image is not None else 1
    found = []
    for inside in components(mean, MIN_AREA):
        own, z_score, p = float(mean[inside].mean()), None, None
        if controls is not None:
            (means, spreads), size = mean_and_spread(controls), size_index(int(inside.sum()), inside.size)
            z_score = float((own - means[size]) / spreads[size])
            p = float(p_value(np.array(z_score), len(controls), tail))
        effect = estimate(samples, inside)
        found.append((Region(box_of(inside, scale), float(inside.mean()), own, *effect, z_score, p), inside))
    found.sort(key=lambda pair: pair[0].effect if pair[0].z_score is None else pair[0].z_score, reverse=True)
    labels = np.zeros(mean.shape, dtype=np.int32)
    for i, (_, inside) in enumerate(found, start=1):
        labels[inside] = i
    return tuple(region for region, _ in found), labels
