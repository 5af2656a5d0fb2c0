"""Boxes: where in the middle square of a picture something is."""

from __future__ import annotations

import numpy as np

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions


def box_of(mask: np.ndarray) -> Box:
    """The smallest box round the ``True`` cells."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return (float(left / width), float(top / height), float(right / width), float(bottom / height))


def inside(box: Box, side: int) -> np.ndarray:
    """Pixels of a square that a box of fractions touches, bool ``(side, side)``."""
    left, top, right, bottom = (edge * side for edge in box)
    mask = np.zeros((side, side), dtype=bool)
    mask[max(0, int(top)) : int(np.ceil(bottom)), max(0, int(left)) : int(np.ceil(right))] = True
    return mask
