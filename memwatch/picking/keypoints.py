"""Keypoints: places in a picture that can be found again in another one, each with the few colours around it.

Colours are kept as they are: the same photograph under another exposure is another picture, a logo is not.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SIDE = 128  # pixels: pictures are looked at in this size
MOST = 192  # keypoints per picture; photographs have 170 on average, and a logo must not lose its own to the rest
GRID = np.array((-3, -1, 1, 3))  # pixels: where colours are read around a keypoint
MARGIN = 4  # pixels: the nearest that a keypoint comes to the border
REACH = 4  # pixels around a keypoint that its colours come from
CORNER, BLOB = 4.0, 6.0  # the least response, in levels of 0..255; below is noise
SCALE = 2.0  # pixels: size of blobs


def keypoints(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where corners and blobs are, and the colours around them.

    Corners are maxima of the structure tensor's smaller eigenvalue, blobs those of a difference of Gaussians.

    Args:
        pixels: RGB uint8 ``(SIDE, SIDE, 3)``.

    Returns:
        ``(MOST, 2)`` uint8, x and y in pixels, and ``(MOST, 4, 4, 3)`` uint8. Both are filled up with zeros; there is
        no keypoint at (0, 0).
    """
    values = pixels.astype(np.float32)
    grey = values.mean(-1)
    found = [_maxima(response, least) for response, least in ((_corners(grey), CORNER), (_blobs(grey), BLOB))]
    x, y, strength = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-strength, kind="stable")[:MOST]
    x, y = x[order], y[order]
    mean = ndimage.uniform_filter(values, (3, 3, 0))
    around = mean[y[:, None, None] + GRID[:, None], x[:, None, None] + GRID]
    places, colours = np.zeros((MOST, 2), np.uint8), np.zeros((MOST, 4, 4, 3), np.uint8)
    places[: len(x)] = np.stack([x, y], axis=1)
    colours[: len(x)] = around.round().clip(0, 255)
    return places, colours


def _corners(grey: np.ndarray) -> np.ndarray:
    """How much a picture ``(SIDE, SIDE)`` changes in its stiller direction, in levels."""
    dx, dy = ndimage.sobel(grey, 1) / 8, ndimage.sobel(grey, 0) / 8
    xx, yy, xy = (ndimage.gaussian_filter(m, 1.5, truncate=2) for m in (dx * dx, dy * dy, dx * dy))
    smaller = (xx + yy) / 2 - np.hypot((xx - yy) / 2, xy)
    return np.sqrt(np.maximum(smaller, 0))


def _blobs(grey: np.ndarray) -> np.ndarray:
    """How far every place of a picture ``(SIDE, SIDE)`` is above or below its surroundings, in levels."""
    near = ndimage.gaussian_filter(grey, SCALE, truncate=2.5)
    result: np.ndarray = np.abs(near - ndimage.gaussian_filter(near, 1.25 * SCALE, truncate=2.5))
    return result


def _maxima(response: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and strength, relative to ``least``, of local maxima."""
    is_top = (response == ndimage.maximum_filter(response, 5)) & (response >= least)
    is_top[:MARGIN] = is_top[-MARGIN:] = False
    is_top[:, :MARGIN] = is_top[:, -MARGIN:] = False
    y, x = np.nonzero(is_top)
    return x, y, response[y, x] / least
