"""Regions: connected parts of a map of numbers. Thresholds are in the map's own unit; pictures play no part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from memwatch.measure.curvature import CurvatureMap


@dataclass(frozen=True)
class Region:
    """One connected part of a map above the threshold.

    Attributes:
        box: ``(left, top, right, bottom)`` in image pixels, right and bottom exclusive.
        area: share of the image, in (0, 1].
        peak, mean: the map's maximum and mean inside the region, in the map's unit.
        sem: standard error of ``mean``, from the map's replicates.
        p: p-value of ``peak`` against the controls; ``None`` without controls.
        level: the timestep at which the region is strongest; ``None`` until ``findings.explained`` has set it.
    """

    box: tuple[int, int, int, int]
    area: float
    peak: float
    mean: float
    sem: float
    p: float | None = None
    level: float | None = None


PEAK = 0.98  # the quantile that stands for a map's peak, so that one odd pixel does not move it


def threshold_of(values: np.ndarray, min_factor: float, relative: float) -> float:
    """The value from which a pixel belongs to a region: the stricter of two rules.

    Args:
        values: a map of log factors, ``(h, w)``.
        min_factor: the factor that a pixel needs in any map.
        relative: the share of the map's own peak that it needs, on the log scale.
    """
    return max(math.log(min_factor), relative * float(np.quantile(values, PEAK)))


def find_regions(
    values: CurvatureMap, threshold: float, *, min_area: float = 0.0, scale: int = 1
) -> tuple[tuple[Region, ...], np.ndarray]:
    """The connected components (8 neighbours) of ``values.mean >= threshold``, largest sum first.

    Args:
        values: samples of shape ``(n, h, w)``.
        threshold: in the map's unit.
        min_area: share of the image in [0, 1]; smaller components are dropped.
        scale: image pixels per map pixel.

    Returns:
        The regions, and an int array ``(h, w)``: 0 outside, i inside ``regions[i - 1]``.
    """
    samples = values.samples.double().numpy()
    mean = samples.mean(0)
    labels, count = ndimage.label(mean >= threshold, structure=np.ones((3, 3)))
    found = []
    for i in range(1, count + 1):
        inside = labels == i
        if inside.mean() < min_area:
            continue
        found.append((_region(samples, inside, scale), inside))
    found.sort(key=lambda pair: pair[0].mean * pair[0].area, reverse=True)
    kept = np.zeros(mean.shape, dtype=np.int32)
    for i, (_, inside) in enumerate(found, start=1):
        kept[inside] = i
    return tuple(region for region, _ in found), kept


def _region(samples: np.ndarray, inside: np.ndarray, scale: int) -> Region:
    """The numbers of one component: ``samples`` ``(n, h, w)``, ``inside`` bool ``(h, w)``."""
    rows, columns = np.nonzero(inside)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    per_replicate = samples[:, inside].mean(1)
    n = len(per_replicate)
    return Region(
        box=(int(left) * scale, int(top) * scale, int(right) * scale, int(bottom) * scale),
        area=float(inside.mean()),
        peak=float(samples.mean(0)[inside].max()),
        mean=float(per_replicate.mean()),
        sem=float(per_replicate.std(ddof=1) / n**0.5) if n > 1 else float("inf"),
    )
