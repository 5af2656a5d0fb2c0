"""Parts at the same place: a banner, a watermark or a frame that otherwise different pictures share.

Small blocks of the thumbnails that are equal bring pairs of pictures together; of each pair the whole thumbnails are
then compared, and regions that are equal and not flat are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from memwatch.picking.lsh import checked, farthest, keys_of, pairs_with_first

SHAPES = ((3, 3), (2, 6), (6, 2))  # of blocks, in cells: the last two are for frames and lines of text
STEP = 2  # cells between blocks
DIRECTIONS, WIDTH = 8, 28.0  # of the keys by which equal blocks are found, see ``keys_of``
FIRST = 2  # see ``pairs_with_first``
TABLES = 2  # independent ways of finding equal blocks
TOLERANCE = 8  # levels of 0..255 by which a cell may differ in each channel: compression, resizing
CONTRAST = 24  # levels between neighbouring cells; what has less is flat
MIN_CELLS = 9  # of a region
MIN_EDGES = 8  # pairs of neighbouring cells in a region with that contrast
CHUNK = 4096  # pairs that are compared at once
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours of a cell, in a stack of thumbnails
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Regions:
    """Regions that pairs of pictures share at the same place.

    Attributes:
        a: one row of each pair, ``(k,)``.
        b: the other.
        masks: where in both, ``(k, cells, cells)`` bool.
    """

    a: np.ndarray
    b: np.ndarray
    masks: np.ndarray


def shared_regions(thumbnails: np.ndarray) -> Regions:
    """Regions that are equal and not flat in two thumbnails.

    In a large group of pictures that share a part not every pair is there, but all hang together.

    Args:
        thumbnails: ``(n, cells, cells, 3)`` uint8.
    """
    a, b = candidate_pairs(thumbnails)
    starts = range(0, max(1, len(a)), CHUNK)
    parts = [slice(start, start + CHUNK) for start in starts]
    found = [equal_regions(thumbnails[a[part]], thumbnails[b[part]]) for part in parts]
    pairs = np.concatenate([which + part.start for part, (which, _) in zip(parts, found, strict=True)])
    return Regions(a[pairs], b[pairs], np.concatenate([masks for _, masks in found]))


def candidate_pairs(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pictures of which some block is equal and not flat; the larger number first."""
    size, n = thumbnails.shape[1], len(thumbnails)
    # Each cell's rows lie together, so that the most and the least of many cells are fast.
    by_cell = np.ascontiguousarray(thumbnails.transpose(1, 2, 3, 0))
    pairs = np.zeros(0, dtype=np.int64)
    for height, width in SHAPES:
        for top in range(0, size - height + 1, STEP):
            found = [pairs]
            for left in range(0, size - width + 1, STEP):
                block = slice(top, top + height), slice(left, left + width)
                cells = by_cell[block].reshape(-1, 3, n)
                rows = np.flatnonzero((cells.max(0) - cells.min(0)).max(0) >= CONTRAST)
                a, b = _equal_blocks(thumbnails[rows, *block].reshape(len(rows), len(cells) * 3))
                found.append(rows[a] * n + rows[b])
            pairs = np.unique(np.concatenate(found))
    return pairs // n, pairs % n


def _equal_blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of blocks ``(n, numbers)`` that are equal."""
    found = []
    for table in range(TABLES):
        keys = keys_of(values, DIRECTIONS, WIDTH, [table])
        found.append(checked(*pairs_with_first(keys, FIRST), lambda a, b: equal_cells(values[a], values[b])))
    a, b = (np.concatenate(side) for side in zip(*found, strict=True))
    return a, b


def equal_cells(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether cells ``(..., 3)`` are equal, or blocks as one line of numbers."""
    result: np.ndarray = farthest(x, y) <= TOLERANCE
    return result


def equal_regions(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regions that are equal and not flat in two stacks of thumbnails ``(k, cells, cells, 3)``.

    Returns:
        For each region the pair that it belongs to, and ``(regions, cells, cells)`` bool.
    """
    equal = equal_cells(x, y)
    edges = _edges(x, equal)
    enough = np.flatnonzero(edges.sum((1, 2)) >= MIN_EDGES)
    equal, edges = equal[enough], edges[enough]
    labels, number = ndimage.label(equal, IN_PLANE)
    cells = np.bincount(labels.ravel(), minlength=number + 1)
    per_region = np.bincount(labels.ravel(), weights=edges.ravel(), minlength=number + 1)
    good = np.flatnonzero((cells >= MIN_CELLS) & (per_region >= MIN_EDGES))
    good = good[good > 0]
    planes = np.searchsorted(np.maximum.accumulate(labels.max((1, 2), initial=0)), good)
    return enough[planes], labels[planes] == good[:, None, None]


def _edges(pictures: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """For each cell, with how many of its right and lower neighbours it has contrast, both in the equal part."""
    edges = np.zeros(equal.shape, dtype=np.int64)
    for axis in (1, 2):
        values = np.moveaxis(pictures, axis, 1)
        step = farthest(values[:, 1:], values[:, :-1])
        both = np.moveaxis(equal, axis, 1)
        np.moveaxis(edges, axis, 1)[:, :-1] += (step >= CONTRAST) & both[:, 1:] & both[:, :-1]
    return edges
