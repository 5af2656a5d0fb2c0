"""Moved parts: a logo or a sticker that otherwise different pictures show at different places, at one scale.

Keypoints whose colours are almost equal bring pairs of pictures together, each pair at an offset. All keypoints of the
two are then compared at that offset; they share a part where several agree, and not just those. Where the surroundings
agree as well, the two are views of one photograph, and no part is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from memwatch.picking.keypoints import REACH, SIDE
from memwatch.picking.lsh import checked, keys_of, pairs_with_next

DIRECTIONS, WIDTH = 7, 40.0  # of the keys by which alike keypoints are found, see ``keys_of``
FOLLOWING = 3  # see ``pairs_with_next``
TABLES = 6  # independent ways of finding alike keypoints
CONTRAST = 40  # levels of 0..255 around a keypoint; those with less are alike by chance
TOLERANCE = 10.0  # levels by which colours may differ in the mean: compression, a shift by half a pixel
RELATIVE = 0.28  # the same, relative to how far the colours lie from their own mean
SHIFT = 1  # pixels by which a keypoint may be off
MIN_POINTS = 4  # keypoints that agree
MIN_SPAN = 10  # pixels that they extend over
MIN_SHARE = 0.5  # of all keypoints among them
RING = 3  # cells of the thumbnail around a part that are its surroundings
DIFFERENT = 0.3  # mean squared difference of surroundings, relative to how much they vary; below they agree
PLAIN = 15.0  # levels: surroundings that vary by less agree by chance
CHUNK = 1024  # pairs of pictures that are compared at once
ROWS = 256  # pictures whose keypoints are prepared at once
NONE = 255  # no keypoint has this number


@dataclass(frozen=True)
class Matches:
    """Pairs of pictures that share something at an offset.

    Attributes:
        a: one row of each pair, ``(k,)``.
        b: the other.
        low: x and y where the part begins in ``a``, pixels, ``(k, 2)``.
        high: where it ends.
        offset: what is at ``p`` in ``a`` is at ``p - offset`` in ``b``.
    """

    a: np.ndarray
    b: np.ndarray
    low: np.ndarray
    high: np.ndarray
    offset: np.ndarray

    def of(self, which: np.ndarray) -> Matches:
        """Some of them; ``which`` is bool, ``(k,)``."""
        return Matches(*(getattr(self, field.name)[which] for field in fields(self)))

    def masks(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in ``a`` and in ``b``: boxes, ``(k, cells, cells)`` bool."""
        return tuple(  # type: ignore[return-value]  # two of them
            _filled(*_in_cells(self.low - by, self.high - by, cells), cells) for by in (0, self.offset)
        )


@dataclass(frozen=True)
class Points:
    """Keypoints of some pictures, and what is compared of them.

    Attributes:
        places: ``(n, MOST, 2)`` uint8, see ``keypoints``.
        colours: ``(n, MOST, 48)`` uint8.
        limits: how far the colours of those that are alike may be from these, levels in sum, ``(n, MOST)`` float32.
        telling: which have so much contrast that they are looked for, ``(n, MOST)`` bool.
    """

    places: np.ndarray
    colours: np.ndarray
    limits: np.ndarray
    telling: np.ndarray


def points_of(places: np.ndarray, colours: np.ndarray) -> Points:
    """Of keypoints as they are kept of pictures, ``(n, MOST, 2)`` and ``(n, MOST, 4, 4, 3)``."""
    colours = colours.reshape(*places.shape[:2], 48)
    limits, contrast = np.zeros(places.shape[:2], np.float32), np.zeros(places.shape[:2], np.uint8)
    for start in range(0, len(places), ROWS):
        part = slice(start, start + ROWS)
        values = colours[part].reshape(-1, places.shape[1], 16, 3)
        contrast[part] = (values.max(2) - values.min(2)).max(-1)
        own = np.abs(values - values.mean(2, keepdims=True, dtype=np.float32)).mean((2, 3))
        limits[part] = 48 * np.minimum(TOLERANCE, RELATIVE * own)
    return Points(places, colours, limits, places.any(-1) & (contrast >= CONTRAST))


def shared_moved(thumbnails: np.ndarray, points: Points) -> Matches:
    """Pairs of pictures that share a part at any offset; in a large group not all, but they hang together.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8.
    """
    return compared(thumbnails, points, *_candidates(points))


def compared(thumbnails: np.ndarray, points: Points, a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> Matches:
    """Those pairs of rows that share a part at that offset, ``(k, 2)``; see ``Matches``."""
    found = []
    for start in range(0, max(1, len(a)), CHUNK):
        part = slice(start, start + CHUNK)
        matches = _compare(points, a[part], b[part], offset[part])
        found.append(matches.of(_surroundings_differ(thumbnails, matches)))
    return Matches(*(np.concatenate([getattr(f, field.name) for f in found]) for field in fields(Matches)))


def alike(x: np.ndarray, y: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Whether colours ``(k, 48)`` around keypoints are almost equal, see ``Points``."""
    result: np.ndarray = (np.maximum(x, y) - np.minimum(x, y)).sum(1, dtype=np.uint16) <= limits
    return result


def _candidates(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of pictures and offsets at which a keypoint is alike: the larger row, the smaller one, ``(k, 2)``."""
    size = len(points.places)
    rows, numbers = np.nonzero(points.telling)
    values, limits = points.colours[rows, numbers], points.limits[rows, numbers]
    at = points.places[rows, numbers].astype(np.int64)
    codes = np.zeros(0, dtype=np.int64)
    for table in range(TABLES):
        keys = keys_of(values, DIRECTIONS, WIDTH, [table])
        along = values @ np.random.default_rng([table, 1]).standard_normal(48).astype(np.float32)
        a, b = pairs_with_next(keys, along, FOLLOWING)
        different = rows[a] != rows[b]
        a, b = checked(
            a[different], b[different], lambda i, j: alike(np.take(values, i, 0), np.take(values, j, 0), limits[i])
        )
        a, b = np.where(rows[a] > rows[b], (a, b), (b, a))
        offset = at[a] - at[b] + SIDE
        code = ((rows[a] * size + rows[b]) * 2 * SIDE + offset[:, 0]) * 2 * SIDE + offset[:, 1]
        codes = np.unique(np.concatenate([codes, code]))
    offset = np.stack([codes // (2 * SIDE) % (2 * SIDE), codes % (2 * SIDE)], axis=1) - SIDE
    pairs = codes // (4 * SIDE * SIDE)
    return one_per_place(pairs // size, pairs % size, offset)


def one_per_place(a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of offsets that lie within a pixel or two only one: it covers the others."""
    near = np.concatenate([a[:, None], b[:, None], offset // (2 * SHIFT + 1)], axis=1)
    first = np.unique(near, axis=0, return_index=True)[1]
    return a[first], b[first], offset[first]


def _compare(points: Points, a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> Matches:
    """Those pairs of which enough keypoints agree."""
    agreeing = _agreeing(points, a, b, offset)
    there = points.places[a].astype(np.int16)
    low = np.where(agreeing[..., None], there, SIDE).min(1)
    high = np.where(agreeing[..., None], there, -1).max(1)
    among = ((there >= low[:, None]) & (there <= high[:, None])).all(-1) & there.any(-1)
    number = agreeing.sum(1)
    good = (number >= MIN_POINTS) & ((high - low).max(1) >= MIN_SPAN) & (number >= MIN_SHARE * among.sum(1))
    return Matches(a, b, low - REACH, high + REACH + 1, offset).of(good)


def _surroundings_differ(thumbnails: np.ndarray, matches: Matches) -> np.ndarray:
    """Whether what lies around the part is not the same in both pictures; bool, ``(k,)``."""
    cells, number = thumbnails.shape[1], len(matches.a)
    low, high = _in_cells(matches.low, matches.high, cells)
    ring = _filled(low - RING, high + RING, cells) & ~_filled(low, high, cells)
    pair, row, column = np.nonzero(ring)
    shift = np.rint(matches.offset * cells / SIDE).astype(np.int64)
    other_row, other_column = row - shift[pair, 1], column - shift[pair, 0]
    shown = (other_row >= 0) & (other_row < cells) & (other_column >= 0) & (other_column < cells)
    pair, row, column, other_row, other_column = (v[shown] for v in (pair, row, column, other_row, other_column))
    x = thumbnails[matches.a[pair], row, column].astype(np.float32)
    y = thumbnails[matches.b[pair], other_row, other_column].astype(np.float32)

    def mean(values: np.ndarray) -> np.ndarray:
        """Over the cells of each pair: ``(k, 3)`` of ``(cells, 3)``."""
        total = np.stack([np.bincount(pair, values[:, i], number) for i in range(3)], axis=1)
        return total / np.maximum(1, np.bincount(pair, minlength=number))[:, None]

    spread = np.mean([mean((values - mean(values)[pair]) ** 2).mean(-1) for values in (x, y)], axis=0)
    result: np.ndarray = (spread < PLAIN**2) | (mean((x - y) ** 2).mean(-1) >= DIFFERENT * spread)
    return result


def _agreeing(points: Points, a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Which keypoints of ``a`` have one alike in ``b`` at that offset: ``(k, MOST)`` bool."""
    places = points.places
    agreeing = np.zeros((len(a), places.shape[1]), dtype=bool)
    rows, local = np.unique(b, return_inverse=True)
    number = np.full((len(rows), SIDE, SIDE), NONE, dtype=np.uint8)  # of the keypoint at each pixel, and round it
    row, point = np.nonzero(places[rows].any(-1))
    x, y = places[rows][row, point].T.astype(np.int64)
    around = [(i, j) for i in range(-SHIFT, SHIFT + 1) for j in range(-SHIFT, SHIFT + 1)]
    for i, j in sorted(around, key=lambda step: -abs(step[0]) - abs(step[1])):  # the keypoint's own pixel comes last
        number[row, y + j, x + i] = point
    there = places[a].astype(np.int64) - offset[:, None]
    pair, point = np.nonzero(places[a].any(-1) & ((there >= 0) & (there < SIDE)).all(-1))
    other = number[local[pair], there[pair, point, 1], there[pair, point, 0]]
    pair, point, other = (values[other != NONE] for values in (pair, point, other))
    mine = a[pair], point
    same = alike(points.colours[mine], points.colours[b[pair], other], points.limits[mine])
    agreeing[pair[same], point[same]] = True
    return agreeing


def _in_cells(low: np.ndarray, high: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in pixels as cells that they reach into by half or more; one at least."""
    low, high = np.rint(low * cells / SIDE), np.rint(high * cells / SIDE)
    return low, np.maximum(high, low + 1)


def _filled(low: np.ndarray, high: np.ndarray, cells: int) -> np.ndarray:
    """Boxes of cells ``(k, 2)`` as masks."""
    cell = np.arange(cells)
    inside = (cell >= low[..., None]) & (cell < high[..., None])  # (k, 2, cells)
    result: np.ndarray = inside[:, 1, :, None] & inside[:, 0, None, :]
    return result
