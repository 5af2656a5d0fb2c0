"""Members: which row of a group stands for it best."""

from __future__ import annotations

import numpy as np
from PIL import Image

from memwatch.picking.survey import Box, Group, GroupKind, Survey

COMPARED = 32  # members of a shared part that are compared with each other


def members_of(survey: Survey, group: Group) -> list[int]:
    """The rows of a group, those first that stand for it best.

    Of near-duplicates any does. Of a shared part it is the one whose rest is least like that of the others, because
    then what is stored is the part. At most 32 are compared, by their thumbnails.
    """
    if group.kind is GroupKind.DUPLICATES:
        return list(group.rows)
    number = len(group.rows)
    compared = np.unique(np.linspace(0, number - 1, min(number, COMPARED)).astype(int)).tolist()
    thumbs = survey.hashes.thumbnails[[group.rows[i] for i in compared]].astype(np.float32)
    apart = {group.rows[i]: _apart(thumbs, n, group.boxes[i]) for n, i in enumerate(compared)}
    return sorted(group.rows, key=lambda row: -apart.get(row, -1.0))


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


def inside(box: Box, side: int) -> np.ndarray:
    """Pixels of a square that a box of fractions touches, bool ``(side, side)``."""
    left, top, right, bottom = (edge * side for edge in box)
    mask = np.zeros((side, side), dtype=bool)
    mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return mask
