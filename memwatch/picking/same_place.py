"""Parts at the same place: a banner, a watermark or a frame that otherwise different pictures share.

Small blocks of the thumbnails that are equal bring pairs of pictures together (by random projections, sorted, then
checked). Of each pair the whole thumbnails are then compared; regions that are equal and not flat are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from memwatch.picking.grouping import slices, spaced

SHAPES = ((3, 3), (2, 6), (6, 2))  # of blocks, in cells: the last two are for frames and lines of text
STEP = 2  # cells between blocks
DIRECTIONS = 8  # random directions that the key of a block is made of
WIDTH = 28.0  # how far blocks may lie apart along a direction and still share a key, levels of 0..255
FIRST = 2  # blocks of a key that each other block of that key is compared with
TABLES = 2  # independent ways of finding equal blocks
TOLERANCE = 8  # levels of 0..255 by which a cell may differ in each channel: compression, resizing
CONTRAST = 24  # levels between neighbouring cells; what has less is flat
MIN_CELLS = 9  # of a region
MIN_EDGES = 8  # pairs of neighbouring cells in a region with that contrast
CHUNK = 4096  # pairs of pictures that are compared at once
BLOCKS = 1 << 15  # blocks, or pairs of them, that are computed with at once
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours of a cell, in a stack of thumbnails
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

MEMBERS = 64  # rows with a part that tell which cells are its own
SHARE = 0.5  # of these rows, and of the part's cells, that must agree
PROBED = 24  # cells of a part that are compared first
ROWS = 1024  # rows that a part is looked for in at once

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the middle square
Part = dict[int, Box]  # by row where it shows the part


def box_of(mask: np.ndarray) -> Box:
    """The smallest box round the ``True`` cells."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return (float(left / width), float(top / height), float(right / width), float(bottom / height))


def inside(box: Box, side: int) -> np.ndarray:
    """Pixels of a square that a box touches, bool ``(side, side)``."""
    left, top, right, bottom = (edge * side for edge in box)
    mask = np.zeros((side, side), dtype=bool)
    mask[max(0, int(top)) : int(np.ceil(bottom)), max(0, int(left)) : int(np.ceil(right))] = True
    return mask


def shared_regions(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regions that are equal and not flat in two of many thumbnails ``(n, cells, cells, 3)`` uint8.

    In a large group of pictures that share a part not every pair is there, but the pairs connect them all. Returned are
    the two rows of each region, ``(k,)`` each, and where it is, ``(k, cells, cells)`` bool.
    """
    a, b = _candidate_pairs(thumbnails)
    parts = list(slices(len(a), CHUNK)) or [slice(0, 0)]
    found = [equal_regions(thumbnails[a[part]], thumbnails[b[part]]) for part in parts]
    pairs = np.concatenate([which + part.start for part, (which, _) in zip(parts, found, strict=True)])
    return a[pairs], b[pairs], np.concatenate([masks for _, masks in found])


def _candidate_pairs(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pictures of which some block is equal and not flat; the larger number first."""
    size, n = thumbnails.shape[1], len(thumbnails)
    by_cell = np.ascontiguousarray(thumbnails.transpose(1, 2, 3, 0))  # so the most and least of many cells are fast
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
    likely = [_pairs_with_first(_keys_of(values, table)) for table in range(TABLES)]
    a, b = (np.concatenate(side) for side in zip(*likely, strict=True))
    return checked(a, b, lambda a, b: equal_cells(values[a], values[b]))


def _keys_of(values: np.ndarray, table: int) -> np.ndarray:
    """Keys that almost equal blocks probably share, other ones in each table; ``(n,)`` int64."""
    rng = np.random.default_rng([table])
    axes = rng.standard_normal((values.shape[1], DIRECTIONS)).astype(np.float32)
    axes /= np.linalg.norm(axes, axis=0)
    begin, factors = rng.random(DIRECTIONS, dtype=np.float32), rng.integers(1, 2**62, DIRECTIONS)
    keys = np.zeros(len(values), dtype=np.int64)
    with np.errstate(over="ignore"):
        for part in slices(len(values), BLOCKS):
            steps = np.floor(values[part] @ axes / WIDTH + begin).astype(np.int64)
            keys[part] = (steps * factors).sum(1)
    return keys


def _pairs_with_first(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each block with the ``FIRST`` lowest of its key and the one before it: k pairs that connect all k."""
    order = np.argsort(keys, kind="stable")
    sorted_ = keys[order]
    start, place = np.searchsorted(sorted_, sorted_), np.arange(len(keys))
    a = np.tile(place, FIRST + 1)
    b = np.concatenate([*(start + i for i in range(FIRST)), place - 1])
    paired = (b < a) & (b >= np.tile(start, FIRST + 1))
    return order[a[paired]], order[b[paired]]


def checked(
    a: np.ndarray, b: np.ndarray, holds: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Those pairs for which ``holds`` says so."""
    near = np.zeros(len(a), dtype=bool)
    for part in slices(len(a), BLOCKS):
        near[part] = holds(a[part], b[part])
    return a[near], b[near]


def equal_cells(x: np.ndarray, y: np.ndarray) -> Any:
    """Whether cells ``(..., 3)`` are equal, or blocks as one line of numbers."""
    return _farthest(x, y) <= TOLERANCE


def equal_regions(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regions that are equal and not flat in two stacks of thumbnails: the pair of each, and its cells as bool."""
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
        step = _farthest(values[:, 1:], values[:, :-1])
        both = np.moveaxis(equal, axis, 1)
        np.moveaxis(edges, axis, 1)[:, :-1] += (step >= CONTRAST) & both[:, 1:] & both[:, :-1]
    return edges


def _farthest(x: np.ndarray, y: np.ndarray) -> Any:
    """The largest difference along the last axis of two uint8 arrays."""
    return (np.maximum(x, y) - np.minimum(x, y)).max(-1, initial=0)


def at_same_place(parts: Sequence[Part], thumbnails: np.ndarray, rows: np.ndarray) -> list[Part]:
    """The same parts, with those of ``rows`` that show them at the same place; ``thumbnails`` are of all rows."""
    found = [dict(part) for part in parts]
    known = [_typical(part, thumbnails) for part in parts]
    for some in np.array_split(rows, len(rows) // ROWS + 1):
        pictures = thumbnails[some]
        by_cell = np.ascontiguousarray(pictures.transpose(1, 2, 0, 3))
        for part, (picture, mask) in zip(found, known, strict=True):
            probed = spaced(np.argwhere(mask).tolist(), PROBED)
            near = np.zeros(len(some), dtype=int)
            for y, x in probed:
                near += equal_cells(by_cell[y, x], picture[y, x])
            likely = np.flatnonzero(near >= max(1, SHARE * len(probed)))
            which, masks = equal_regions(np.broadcast_to(picture, pictures[likely].shape), pictures[likely])
            covered = (masks & mask).sum((1, 2))
            good = np.flatnonzero(covered >= SHARE * mask.sum())
            for i in good[np.argsort(covered[good], kind="stable")]:  # the largest last
                part[int(some[likely[which[i]]])] = box_of(masks[i] & mask)
    return found


def _typical(part: Part, thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of the pictures with a part, and the cells of it that are equal in most of them."""
    some = spaced(sorted(part), MEMBERS)
    pictures = thumbnails[some]
    picture = np.median(pictures, axis=0).astype(np.uint8)
    within = np.mean([inside(part[row], len(picture)) for row in some], axis=0) >= SHARE
    return picture, within & (equal_cells(pictures, picture).mean(0) >= SHARE)


def shared_area(a: Box, b: Box) -> float:
    """The area that two boxes share, as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0
