"""Regions: the connected parts of a heatmap that stand out, and how strong each is. They say where, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals

MIN_FACTOR = 1.1  # reduction factor that a pixel of a region reaches
RELATIVE = 0.35  # share of the map's own peak, on the log scale: a smooth edge lies in the middle of a slope
MIN_AREA = 1 / 64  # of the image: the smallest region, and the smallest size at which controls are compared
PEAK = 0.98  # the quantile that stands for a map's peak, so that one odd pixel does not move it
NEIGHBOURS = np.ones((3, 3))
SMALL, SMALL_RELATIVE = 0.15, 0.5  # below that share of the map a region is a hill: its upper half belongs to it


@dataclass(frozen=True)
class Region:
    """One connected part of a heatmap above the threshold. It says where; the verdict rests on T of the whole map.

    Attributes:
        box: ``(left, top, right, bottom)`` in image pixels, right and bottom exclusive.
        area: share of the image, in (0, 1].
        effect: mean of the map inside, natural log of a factor; a little too large, since it chose the region.
        sem: its standard error over noise draws; infinite with one draw.
    """

    box: tuple[int, int, int, int]
    area: float
    effect: float
    sem: float


def threshold_of(values: np.ndarray) -> float:
    """From which value of a map of log factors ``(h, w)`` a pixel belongs to a region: the stricter of two rules."""
    return max(math.log(MIN_FACTOR), RELATIVE * float(np.quantile(values, PEAK)))


def components(values: np.ndarray, min_area: float = 0.0) -> Iterator[np.ndarray]:
    """The connected components (8 neighbours) of a map ``(h, w)`` above ``threshold_of``, as bool ``(h, w)``.

    A small one is cut once more, see ``SMALL``. Those below ``min_area``, a share of the map, are dropped.
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


def box_of(inside: np.ndarray, scale: int) -> tuple[int, int, int, int]:
    """``(left, top, right, bottom)`` of a bool map, times ``scale`` image pixels per map pixel."""
    rows, columns = np.nonzero(inside)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return int(left) * scale, int(top) * scale, int(right) * scale, int(bottom) * scale


def regions_of(observation: Observation, signals: Signals | None) -> tuple[tuple[Region, ...], np.ndarray | None]:
    """The regions of the heatmap, the strongest first, and their labels ``(h, w)``: i inside the i-th, 0 outside."""
    if signals is None or signals.heatmap is None:
        return (), None
    samples = signals.heatmap.samples.double().numpy()
    mean = samples.mean(0)
    scale = observation.image.shape[0] // mean.shape[0] if observation.image is not None else 1
    found = [(region_of(samples, inside, scale), inside) for inside in components(mean, MIN_AREA)]
    found.sort(key=lambda pair: pair[0].effect * math.sqrt(pair[0].area), reverse=True)
    labels = np.zeros(mean.shape, dtype=np.int32)
    for i, (_, inside) in enumerate(found, start=1):
        labels[inside] = i
    return tuple(region for region, _ in found), labels


def region_of(samples: np.ndarray, inside: np.ndarray, scale: int) -> Region:
    """One component, from one map per noise draw ``(draws, h, w)``."""
    effects = samples[:, inside].mean(1)
    sem = float(effects.std(ddof=1) / math.sqrt(len(effects))) if len(effects) > 1 else math.inf
    return Region(box_of(inside, scale), float(inside.mean()), float(effects.mean()), sem)
