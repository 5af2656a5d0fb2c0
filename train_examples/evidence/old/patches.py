"""Patch correspondence: how much of a region is found again, near its place, in another picture. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

PATCH = 8  # pixels
STRIDE = 4
REACH = 3  # pixels that a patch may have moved, each way
MATCH = 0.8  # normalized cross-correlation from which two patches are the same
INSIDE = 0.5  # share of a patch that lies in the mask, at least
TEXTURE = 0.04  # contrast of a patch (root mean square, 1 is from black to white) below which it looks like any other
TINY = 1e-6  # of a product of variances; flat patches match nothing


def matching_share(target: np.ndarray, pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of the target's patches that each picture shows within ``REACH`` pixels of their place, in [0, 1].

    Patches that reach out of the mask are compared inside it alone. Flat ones do not count; where all are, it is 0.

    Args:
        target: RGB uint8 ``(H, W, 3)``, at least ``PATCH`` pixels each way.
        pictures: RGB uint8 ``(n, H, W, 3)``.
        mask: bool ``(H, W)``, not empty.

    Returns:
        ``(n,)``
    """
    rows, columns = extent(np.any(mask, axis=1)), extent(np.any(mask, axis=0))
    inside = mask[rows, columns].astype(np.float32)
    down, across = windows(len(inside)), windows(inside.shape[1]).T
    target_ = np.moveaxis(target[rows, columns], -1, 0).astype(np.float32) / 255 * inside
    size = np.maximum(down @ inside @ across, 1)
    mean = down @ target_ @ across / size  # (3, rows, columns) of patches
    variance = down @ np.square(target_).sum(0) @ across / size - np.square(mean).sum(0)
    counts = (size >= INSIDE * PATCH**2) & (variance >= 3 * TEXTURE**2)
    if not counts.any():
        return np.zeros(len(pictures))
    best = np.full((len(pictures), *size.shape), -1, dtype=np.float32)
    for shifted in moved(pictures, rows, columns):
        there = shifted * inside
        mean_there = down @ there @ across / size
        squares = np.einsum("nchw,nchw->nhw", there, there)
        products = np.einsum("nchw,chw->nhw", there, target_)
        variance_there = down @ squares @ across / size - np.square(mean_there).sum(1)
        covariance = down @ products @ across / size - (mean_there * mean).sum(1)
        scale = np.sqrt(np.maximum(variance * variance_there, TINY))
        best = np.maximum(best, covariance / scale)
    share: np.ndarray = (best[:, counts] >= MATCH).mean(1)
    return share


def extent(used: np.ndarray) -> slice:
    """From the first to the last that is used, and to ``PATCH`` of them where they are fewer."""
    first, last = (int(i) for i in np.flatnonzero(used)[[0, -1]])
    start = max(0, min(first, len(used) - PATCH))
    return slice(start, max(last + 1, start + PATCH))


def windows(length: int) -> np.ndarray:
    """Which pixels each patch covers along one axis, ``(patches, length)``, 0 or 1; the last patch ends at the end.

    >>> windows(10).astype(int)
    array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
           [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    """
    starts = np.unique([*range(0, length - PATCH, STRIDE), length - PATCH])
    offsets = np.arange(length)[None] - starts[:, None]
    covered: np.ndarray = ((offsets >= 0) & (offsets < PATCH)).astype(np.float32)
    return covered


def moved(pictures: np.ndarray, rows: slice, columns: slice) -> Iterator[np.ndarray]:
    """That part of the pictures, and the same part moved by up to ``REACH`` pixels each way.

    Args:
        pictures: RGB uint8 ``(n, H, W, 3)``.

    Yields:
        ``(n, 3, h, w)`` in [0, 1], float32.
    """
    channels = np.moveaxis(pictures, -1, 1).astype(np.float32) / 255
    padded = np.pad(channels, ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH)), mode="edge")
    height, width = rows.stop - rows.start, columns.stop - columns.start
    for top in range(rows.start, rows.start + 2 * REACH + 1):
        for left in range(columns.start, columns.start + 2 * REACH + 1):
            yield padded[..., top : top + height, left : left + width]
