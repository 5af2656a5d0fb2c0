"""Parts that were found in some rows of a large set, looked for in all others.

A part at the same place is known by its cells, a part that moves by its keypoints in a few rows that show it. Each row
is looked at once, so that the time grows with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memwatch.picking.alike import checked, keys_of
from memwatch.picking.boxes import Box, box_of, inside
from memwatch.picking.keypoints import SIDE
from memwatch.picking.moved import DIRECTIONS, TABLES, WIDTH, Points, alike, compared, one_per_place, points_of
from memwatch.picking.same_place import equal_cells, equal_regions

MEMBERS = 64  # rows with a part that say which cells are its own
SHARE = 0.5  # of these rows, and of the part's cells, that must agree
PROBED = 24  # cells of a part that are compared first
EXEMPLARS = 4  # rows with a part whose keypoints are looked for
VOTES = 2  # of their keypoints that a row must have at one offset before all are compared
ROWS = 1024  # rows whose keypoints are looked at together

Boxes = dict[int, Box]  # by row


def at_same_place(parts: Sequence[Boxes], thumbnails: np.ndarray, rows: np.ndarray) -> list[Boxes]:
    """The same parts, with those of ``rows`` that show them at the same place.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8, of all rows.
    """
    return [part | _same_cells(part, thumbnails, rows) for part in parts]


def _same_cells(part: Boxes, thumbnails: np.ndarray, rows: np.ndarray) -> Boxes:
    """Where ``rows`` show a part that was found."""
    picture, mask = _typical(part, thumbnails)
    y, x = np.nonzero(mask)
    if len(y) == 0:
        return {}
    probed = np.unique(np.linspace(0, len(y) - 1, PROBED).astype(int))
    near = np.mean([equal_cells(thumbnails[rows, y[i], x[i]], picture[y[i], x[i]]) for i in probed], axis=0)
    found: Boxes = {}
    for some in np.array_split(likely := rows[near >= SHARE], len(likely) // ROWS + 1):
        which, masks = equal_regions(np.broadcast_to(picture, (len(some), *picture.shape)), thumbnails[some])
        covered = (masks & mask).sum((1, 2))
        good = np.flatnonzero(covered >= SHARE * mask.sum())
        found |= {int(some[which[i]]): box_of(masks[i] & mask) for i in good[np.argsort(covered[good], kind="stable")]}
    return found


def _typical(part: Boxes, thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of the pictures with a part, and the cells of it that are equal in most of them."""
    some = spaced(sorted(part), MEMBERS)
    pictures = thumbnails[some]
    picture = np.median(pictures, axis=0).astype(np.uint8)
    within = np.mean([inside(part[row], len(picture)) for row in some], axis=0) >= SHARE
    return picture, within & (equal_cells(pictures, picture).mean(0) >= SHARE)


# --- moved -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exemplars:
    """Rows with parts that were found.

    Attributes:
        part: for each the number of the part.
        boxes: where the part is.
        rows: which rows they are.
        points: their keypoints, those of the part alone.
    """

    part: list[int]
    boxes: list[Box]
    rows: list[int]
    points: Points


def at_any_place(
    parts: Sequence[Boxes], thumbnails: np.ndarray, places: np.ndarray, colours: np.ndarray, rows: np.ndarray
) -> list[Boxes]:
    """The same parts, with those of ``rows`` that show them anywhere; see ``shared_parts``."""
    found = [dict(part) for part in parts]
    if not parts:
        return found
    known = _exemplars(parts, places, colours)
    for some in np.array_split(rows, len(rows) // ROWS + 1):
        points = _together(points_of(places[some], colours[some]), known.points)
        both = thumbnails[np.concatenate([some, known.rows]).astype(np.int64)]
        shown = compared(both, points, *_candidates(points, len(some)))
        for row, exemplar, offset in zip(shown.a, shown.b - len(some), shown.offset, strict=True):
            box = _moved_by(known.boxes[exemplar], offset)
            found[known.part[exemplar]].setdefault(int(some[row]), box)
    return found


def _exemplars(parts: Sequence[Boxes], places: np.ndarray, colours: np.ndarray) -> _Exemplars:
    of = [(number, row) for number, part in enumerate(parts) for row in spaced(sorted(part), EXEMPLARS)]
    rows, boxes = [row for _, row in of], [parts[number][row] for number, row in of]
    own = places[rows].copy()
    for keypoints, box in zip(own, boxes, strict=True):
        left, top, right, bottom = (edge * SIDE for edge in box)
        x, y = keypoints.T
        keypoints[(x < left) | (x >= right) | (y < top) | (y >= bottom)] = 0
    return _Exemplars([number for number, _ in of], boxes, rows, points_of(own, colours[rows]))


def _together(a: Points, b: Points) -> Points:
    return Points(*(np.concatenate([vars(a)[name], vars(b)[name]]) for name in vars(a)))


def _candidates(points: Points, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, the first ``number``, and exemplars, the others, with the offset at which several keypoints are alike."""
    rows, numbers = np.nonzero(points.telling)
    values, limits = points.colours[rows, numbers], points.limits[rows, numbers]
    known = np.flatnonzero(rows >= number)
    found = [np.zeros(0, np.int64)]
    for table in range(TABLES):
        keys = keys_of(values, DIRECTIONS, WIDTH, [table])
        order = known[np.argsort(keys[known], kind="stable")]
        first, last = (np.searchsorted(keys[order], keys[: known[0]], side) for side in ("left", "right"))
        a = np.repeat(np.arange(known[0]), last - first)
        b = order[np.arange(len(a)) - np.repeat(np.cumsum(last - first) - last, last - first)]
        pairs = checked(a, b, lambda i, j: alike(values[i], values[j], limits[i]))
        found.append(pairs[0] * len(values) + pairs[1])
    a, b = np.divmod(np.unique(np.concatenate(found)), len(values))
    at = points.places[rows, numbers].astype(np.int64)
    return _voted(rows[a], rows[b], at[a] - at[b])


def _voted(a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, exemplars and offsets ``(k, 2)`` on which several pairs of keypoints agree, by a pixel."""
    codes = ((a * (b.max(initial=0) + 1) + b) * 4 * SIDE + offset[:, 0] + SIDE) * 4 * SIDE + offset[:, 1] + SIDE
    codes, first, votes = np.unique(codes, return_index=True, return_counts=True)
    total = votes.copy()
    for step in (1, 4 * SIDE - 1, 4 * SIDE, 4 * SIDE + 1):
        place = np.searchsorted(codes, codes + step).clip(max=max(0, len(codes) - 1))
        there = codes[place] == codes + step
        total[there] += votes[place[there]]
        np.add.at(total, place[there], votes[there])
    first = first[total >= VOTES]
    return one_per_place(a[first], b[first], offset[first])


def _moved_by(box: Box, offset: np.ndarray) -> Box:
    """A box as far elsewhere as ``offset`` says, pixels; what would be outside of the picture is cut off."""
    x, y = (float(by) / SIDE for by in offset)
    left, top, right, bottom = box[0] + x, box[1] + y, box[2] + x, box[3] + y
    return max(0.0, left), max(0.0, top), min(1.0, right), min(1.0, bottom)


def spaced(rows: Sequence[int], number: int) -> list[int]:
    """So many of them at most, evenly spaced."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int))]
