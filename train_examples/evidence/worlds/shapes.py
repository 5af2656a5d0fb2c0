"""Shapes: masks of a stated size, on the grid of latents and off it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from evidence.worlds.sources import SIZE

CELL = 4  # pixels per latent of tiny-sd
SHAPES = ("on the grid", "rectangle", "ellipse", "star")
SIZES = {"large": (0.30, 0.60), "middle": (0.12, 0.30), "small": (0.04, 0.12), "tiny": (0.02, 0.04)}  # of the picture


def place(rng: np.random.Generator, low: float, high: float, shape: str) -> np.ndarray:
    """A mask, bool ``(SIZE, SIZE)``, somewhere in the picture.

    Args:
        low, high: bounds of its share of the picture.
        shape: one of ``SHAPES``; the first one covers whole latents.

    Raises:
        ValueError: no such place was found.
    """
    for _ in range(10_000):
        area = rng.uniform(low, high) * SIZE**2
        aspect = math.exp(rng.uniform(-0.5, 0.5))
        mask = _drawn(rng, shape, math.sqrt(area * aspect), math.sqrt(area / aspect))
        if mask is not None and low <= mask.mean() <= high:
            return mask
    raise ValueError(f"no {shape!r} of {low:.0%} to {high:.0%} fits into {SIZE} pixels")


def _drawn(rng: np.random.Generator, shape: str, width: float, height: float) -> np.ndarray | None:
    """One mask of about ``width`` times ``height`` pixels; ``None`` where it does not fit."""
    if shape in ("on the grid", "rectangle"):
        unit = CELL if shape == "on the grid" else 1
        columns, rows, cells = round(width / unit), round(height / unit), SIZE // unit
        if not (1 <= columns <= cells and 1 <= rows <= cells):
            return None
        left, top = int(rng.integers(cells - columns + 1)) * unit, int(rng.integers(cells - rows + 1)) * unit
        return rectangle(left, top, left + columns * unit, top + rows * unit)
    stretch = {"ellipse": 2 / math.sqrt(math.pi), "star": 1.6}[shape]  # so that the area is that of the rectangle
    a, b = width * stretch / 2, height * stretch / 2
    if 2 * a > SIZE or 2 * b > SIZE:
        return None
    x, y = rng.uniform(a, SIZE - a), rng.uniform(b, SIZE - b)
    return ellipse(x, y, a, b) if shape == "ellipse" else star(x, y, a, b, rng.uniform(0, math.tau))


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def ellipse(x: float, y: float, a: float, b: float) -> np.ndarray:
    """Pixels whose centre lies within semi-axes ``a`` and ``b`` of ``(x, y)``."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    inside: np.ndarray = ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1
    return inside


def star(x: float, y: float, a: float, b: float, turn: float) -> np.ndarray:
    """A star of five points within semi-axes ``a`` and ``b`` of ``(x, y)``."""
    radii = [1.0, 0.62] * 5
    angles = [turn + math.tau * i / 10 for i in range(10)]
    points = [
        (x + a * r * math.cos(angle), y + b * r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True)
    ]
    canvas = Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas).copy()
