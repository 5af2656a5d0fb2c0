"""Parts that were found in some rows of a large set, looked for in all others.

A part at the same place is known by its cells, a part that moves by its keypoints in a few rows that show it. Each row
is looked at once, so that the time grows with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from memwatch.picking.boxes import Box, box_of, inside
from memwatch.picking.keypoints import SIDE
from memwatch.picking.lsh import checked, keys_of
from memwatch.picking.moved import DIRECTIONS, TABLES, WIDTH, Points, alike, compared, one_per_place, points_of
from memwatch.picking.same_place import equal_cells, equal_regions

MEMBERS = 64  # rows with a part that say which cells are its own
SHARE = 0.5  # of these rows, and of the part's cells, that must agree
PROBED = 24  # cells of a part that are compared first
MARGIN = 2 / 32  # of a picture, round a part, that is taken to be its own when it is erased
EXEMPLARS = 4  # rows with a part whose keypoints are looked for
MATCHES = 64  # of their keypoints that a keypoint is compared with in each of ``TABLES``
VOTES = 2  # of their keypoints that a row must have at one offset before all are compared
ROWS = 1024  # rows whose keypoints are looked at together

Boxes = dict[int, Box]  # by row
T = TypeVar("T")


def at_same_place(parts: Sequence[Boxes], thumbnails: np.ndarray, rows: np.ndarray) -> list[Boxes]:
    """The same parts, with those of ``rows`` that show them at the same place.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8, of all rows.
    """
    found = [dict(part) for part in parts]
    known = [_typical(part, thumbnails) for part in parts]
    for some in np.array_split(rows, len(rows) // ROWS + 1):
        pictures = thumbnails[some]
        by_cell = np.ascontiguousarray(pictures.transpose(1, 2, 0, 3))
        for part, (picture, mask) in zip(found, known, strict=True):
            likely = _probed(by_cell, picture, mask)
            if len(likely):
                part |= {int(some[i]): box for i, box in _same_cells(picture, mask, pictures, likely).items()}
    return found


def _probed(by_cell: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Numbers of pictures ``(cells, cells, n, 3)`` of which a few cells are those of a part."""
    probed = spaced(np.argwhere(mask).tolist(), PROBED)
    near = np.zeros(by_cell.shape[2], dtype=int)
    for y, x in probed:
        near += equal_cells(by_cell[y, x], picture[y, x])
    return np.flatnonzero(near >= max(1, SHARE * len(probed)))


def _same_cells(picture: np.ndarray, mask: np.ndarray, pictures: np.ndarray, likely: np.ndarray) -> Boxes:
    """Where those of ``pictures`` that are likely to show a part do, by their numbers."""
    which, masks = equal_regions(np.broadcast_to(picture, pictures[likely].shape), pictures[likely])
    covered = (masks & mask).sum((1, 2))
    good = np.flatnonzero(covered >= SHARE * mask.sum())
    largest_last = good[np.argsort(covered[good], kind="stable")]
    return {int(likely[which[i]]): box_of(masks[i] & mask) for i in largest_last}


def _typical(part: Boxes, thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of the pictures with a part, and the cells of it that are equal in most of them."""
    some = spaced(sorted(part), MEMBERS)
    pictures = thumbnails[some]
    picture = np.median(pictures, axis=0).astype(np.uint8)
    within = np.mean([inside(part[row], len(picture)) for row in some], axis=0) >= SHARE
    return picture, within & (equal_cells(pictures, picture).mean(0) >= SHARE)


def erase(rows: np.ndarray, parts: Sequence[Boxes], thumbnails: np.ndarray, places: np.ndarray) -> None:
    """Fill with noise, and leave without keypoints, where ``rows`` show parts: two rows share nothing there any more.

    Args:
        thumbnails: ``(k, cells, cells, 3)`` uint8, of ``rows``; changed.
        places: ``(k, MOST, 2)`` uint8; changed.
    """
    number, rng = {int(row): i for i, row in enumerate(rows)}, np.random.default_rng(len(rows))
    for part in parts:
        for row, (left, top, right, bottom) in part.items():
            if (i := number.get(row)) is not None:
                box = left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN
                cells = inside(box, thumbnails.shape[1])
                thumbnails[i][cells] = rng.integers(0, 256, (cells.sum(), 3), dtype=np.uint8)
                places[i][_within(places[i], box)] = 0


def _within(places: np.ndarray, box: Box) -> np.ndarray:
    """Which keypoints ``(k, 2)`` lie in a box of fractions."""
    (x, y), (left, top, right, bottom) = places.T, (edge * SIDE for edge in box)
    result: np.ndarray = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return result


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
        keypoints[~_within(keypoints, box)] = 0
    return _Exemplars([number for number, _ in of], boxes, rows, points_of(own, colours[rows]))


def _together(a: Points, b: Points) -> Points:
    return Points(*(np.concatenate([vars(a)[name], vars(b)[name]]) for name in vars(a)))


def _candidates(points: Points, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, the first ``number``, and exemplars, the others, with the offset at which several keypoints are alike."""
    rows, numbers = np.nonzero(points.telling)
    values, limits = points.colours[rows, numbers], points.limits[rows, numbers]
    begin = int(np.searchsorted(rows, number))  # of the exemplars' keypoints
    found = [np.zeros(0, np.int64)]
    for table in range(TABLES):
        keys = keys_of(values, DIRECTIONS, WIDTH, [table])
        order = begin + np.argsort(keys[begin:], kind="stable")
        first, last = (np.searchsorted(keys[order], keys[:begin], side) for side in ("left", "right"))
        each = np.minimum(last - first, MATCHES)
        a = np.repeat(np.arange(begin), each)
        b = order[np.arange(len(a)) - np.repeat(np.cumsum(each) - each - first, each)]
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


def spaced(values: Sequence[T], number: int) -> list[T]:
    """So many of them at most, evenly spaced."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(number, len(values))).astype(int))]
