"""Moved parts: a logo or a sticker that otherwise different pictures show at different places, at one scale.

Keypoints whose colours are almost equal bring pairs of pictures together, each pair at an offset. All keypoints of the
two are then compared at that offset; they share a part where several agree, and not just those. Where the surroundings
agree as well, the two are views of one photograph, and no part is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage

from memwatch.picking.alike import checked, keys_of, pairs_with_next
from memwatch.picking.keypoints import REACH, SIDE

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
        return _filled(self.low, self.high, cells), _filled(self.low - self.offset, self.high - self.offset, cells)


def shared_moved(thumbnails: np.ndarray, places: np.ndarray, colours: np.ndarray) -> Matches:
    """Pairs of pictures that share a part at any offset; in a large group not all, but they hang together.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8.
        places: ``(n, MOST, 2)`` uint8, see ``keypoints``.
        colours: ``(n, MOST, 4, 4, 3)`` uint8.
    """
    a, b, offset = _candidates(places, colours)
    found = []
    for start in range(0, max(1, len(a)), CHUNK):
        part = slice(start, start + CHUNK)
        matches = _compare(places, colours, a[part], b[part], offset[part])
        found.append(matches.of(_surroundings_differ(thumbnails, matches)))
    return Matches(*(np.concatenate([getattr(f, field.name) for f in found]) for field in fields(Matches)))


def alike(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether colours ``(k, 48)`` around keypoints are almost equal, measured by their own contrast."""
    one, other = (values.reshape(len(values), 16, 3).astype(np.float32) for values in (x, y))
    difference = np.abs(one - other).mean((1, 2))
    own = np.abs(one - one.mean(1, keepdims=True)).mean((1, 2))
    result: np.ndarray = difference <= np.minimum(TOLERANCE, RELATIVE * own)
    return result


def _candidates(places: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of pictures and offsets at which a keypoint is alike: the larger row, the smaller one, ``(k, 2)``."""
    most = places.shape[1]
    values = colours.reshape(-1, 48)
    contrast = np.ptp(values.reshape(len(values), 16, 3), axis=1).max(-1)
    which = np.flatnonzero(places.any(-1).ravel() & (contrast >= CONTRAST))
    values, rows, at = values[which], which // most, places.reshape(-1, 2)[which].astype(np.int64)
    codes = np.zeros(0, dtype=np.int64)
    for table in range(TABLES):
        keys = keys_of(values, DIRECTIONS, WIDTH, [table])
        along = values @ np.random.default_rng([table, 1]).standard_normal(values.shape[1]).astype(np.float32)
        a, b = pairs_with_next(keys, along, FOLLOWING)
        different = rows[a] != rows[b]
        a, b = checked(a[different], b[different], values, alike)
        a, b = np.where(rows[a] > rows[b], (a, b), (b, a))
        offset = at[a] - at[b] + SIDE
        code = ((rows[a] * len(places) + rows[b]) * 2 * SIDE + offset[:, 0]) * 2 * SIDE + offset[:, 1]
        codes = np.unique(np.concatenate([codes, code]))
    offset = np.stack([codes // (2 * SIDE) % (2 * SIDE), codes % (2 * SIDE)], axis=1) - SIDE
    pairs = codes // (4 * SIDE * SIDE)
    return _one_per_place(pairs // len(places), pairs % len(places), offset)


def _one_per_place(a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of offsets that lie within a pixel or two only one: it covers the others."""
    near = np.concatenate([a[:, None], b[:, None], offset // (2 * SHIFT + 1)], axis=1)
    first = np.unique(near, axis=0, return_index=True)[1]
    return a[first], b[first], offset[first]


def _compare(places: np.ndarray, colours: np.ndarray, a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> Matches:
    """Those pairs of which enough keypoints agree."""
    agreeing = _agreeing(places, colours, a, b, offset)
    there = places[a].astype(np.int64)
    low = np.where(agreeing[..., None], there, SIDE).min(1)
    high = np.where(agreeing[..., None], there, -1).max(1)
    among = ((there >= low[:, None]) & (there <= high[:, None])).all(-1) & there.any(-1)
    number = agreeing.sum(1)
    good = (number >= MIN_POINTS) & ((high - low).max(1) >= MIN_SPAN) & (number >= MIN_SHARE * among.sum(1))
    return Matches(a, b, low - REACH, high + REACH + 1, offset).of(good)


def _surroundings_differ(thumbnails: np.ndarray, matches: Matches) -> np.ndarray:
    """Whether what lies around the part is not the same in both pictures; bool, ``(k,)``."""
    cells = thumbnails.shape[1]
    inside = matches.masks(cells)[0]
    ring = ndimage.binary_dilation(inside, np.ones((1, 3, 3), dtype=bool), iterations=RING) & ~inside
    shift = np.rint(matches.offset * cells / SIDE).astype(np.int64)
    row = np.arange(cells)[:, None] - shift[:, 1, None, None]
    column = np.arange(cells) - shift[:, 0, None, None]
    ring &= (row >= 0) & (row < cells) & (column >= 0) & (column < cells)
    there = np.arange(len(ring))[:, None, None], row.clip(0, cells - 1), column.clip(0, cells - 1)
    x, y = thumbnails[matches.a].astype(np.float32), thumbnails[matches.b][there].astype(np.float32)
    spread = (_variance(x, ring) + _variance(y, ring)) / 2
    squared = _mean((x - y) ** 2, ring).mean(-1)
    result: np.ndarray = (spread < PLAIN**2) | (squared >= DIFFERENT * spread)
    return result


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean over the ``True`` cells: ``(k, 3)`` of ``(k, cells, cells, 3)``."""
    result: np.ndarray = (values * where[..., None]).sum((1, 2)) / np.maximum(1, where.sum((1, 2)))[:, None]
    return result


def _variance(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Variance over the ``True`` cells, mean over channels: ``(k,)``."""
    around = values - _mean(values, where)[:, None, None]
    result: np.ndarray = _mean(around**2, where).mean(-1)
    return result


def _agreeing(places: np.ndarray, colours: np.ndarray, a: np.ndarray, b: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Which keypoints of ``a`` have one alike in ``b`` at that offset: ``(k, MOST)`` bool."""
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
    same = alike(colours[a[pair], point], colours[b[pair], other])
    agreeing[pair[same], point[same]] = True
    return agreeing


def _filled(low: np.ndarray, high: np.ndarray, cells: int) -> np.ndarray:
    """Boxes in pixels as cells that they reach into by half or more."""
    low, high = np.rint(low * cells / SIDE), np.rint(high * cells / SIDE)
    cell = np.arange(cells)
    inside = (cell >= low[..., None]) & (cell < np.maximum(high, low + 1)[..., None])  # (k, 2, cells)
    result: np.ndarray = inside[:, 1, :, None] & inside[:, 0, None, :]
    return result
