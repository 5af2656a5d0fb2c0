"""Members: which row of a group stands for it best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from memwatch.picking.boxes import Box, inside

COMPARED = 32  # members of a shared part that are compared with each other


def best_members(thumbnails: np.ndarray, rows: Sequence[int], boxes: Sequence[Box]) -> tuple[int, ...]:
    """Of rows that share a part those whose rest is least like that of the others come first.

    Because then what is stored is the part. ``COMPARED`` at most are compared, and returned.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8, of all rows.
        boxes: where the part is in each of ``rows``.
    """
    number = len(rows)
    compared = np.unique(np.linspace(0, number - 1, min(number, COMPARED)).astype(int)).tolist()
    thumbs = thumbnails[[rows[i] for i in compared]].astype(np.float32)
    apart = {rows[i]: _apart(thumbs, n, boxes[i]) for n, i in enumerate(compared)}
    return tuple(sorted(apart, key=lambda row: -apart[row]))


def _apart(thumbs: np.ndarray, i: int, box: Box) -> float:
    """Mean difference of a thumbnail to all, ``(n, side, side, 3)``, outside of its own box."""
    outside = ~inside(box, thumbs.shape[1])
    return float(np.abs(thumbs[:, outside] - thumbs[i, outside]).mean()) if outside.any() else 0.0


def middle_square(picture: Image.Image, size: int) -> Image.Image:
    """What training sees of a picture: its middle square, ``size`` pixels a side."""
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BOX, box=box)
