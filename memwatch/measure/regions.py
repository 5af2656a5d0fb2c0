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
MIN_AREA = 1 / 64  # of the image: the smallest region, and the smallest size at which controls are compared
NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class Region:
    """One connected part of a heatmap above the threshold. It says where; the verdict rests on T of the whole map.

    Attributes:
        box: ``(left, top, right, bottom)`` in image pixels, right and bottom exclusive.
        area: share of the image, in (0, 1].
        effect: natural log of the factor by which the loss has fallen inside, see ``Signals.fallen``; a little too
            large, since the same noise chose the region.
        sem: its standard error over noise draws; infinite with one draw.
    """

    box: tuple[int, int, int, int]
    area: float
    effect: float
    sem: float


def threshold_of(values: np.ndarray) -> float:
    """From which value of a map of log factors ``(h, w)`` a pixel belongs to a region: Otsu's threshold, or the least.

    It is where the classes below and above differ most (Otsu 1979).
    """
    rising = np.sort(values, axis=None)
    below = np.arange(1, rising.size)  # how many are left out
    sums = np.cumsum(rising)
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / (rising.size - below)
    between = below * (rising.size - below) * apart**2
    return max(math.log(MIN_FACTOR), float(rising[1 + np.argmax(between)] if between.size else rising[0]))


def components(values: np.ndarray, min_area: float = 0.0) -> Iterator[np.ndarray]:
    """The connected components (8 neighbours) of a map ``(h, w)`` above ``threshold_of``, as bool ``(h, w)``.

    Those below ``min_area``, a share of the map, are dropped.
    """
    return (inside for inside in _connected(values >= threshold_of(values)) if inside.mean() >= min_area)


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
    if signals is None or signals.heatmap is None or signals.fallen is None:
        return (), None
    mean, fallen = signals.heatmap.mean.double().numpy(), signals.fallen.samples.double().numpy()
    scale = observation.image.shape[0] // mean.shape[0] if observation.image is not None else 1
    found = [(region_of(fallen, inside, scale), inside) for inside in components(mean, MIN_AREA)]
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
