"""Parts at the same place: a banner, a watermark or a frame that otherwise different pictures share.

Small blocks of the thumbnails that are equal bring pairs of pictures together (by random projections, sorted, then
checked). Of each pair the whole thumbnails are then compared; regions that are equal and not flat are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
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
SHIFT = 4  # cells at least, by which a picture is moved to see what is equal by chance
RARELY = 1e-3  # share of such pairs that may share more by chance
MORE = 1.5  # times as much a part must be, as margins and lines are at one place in both directions
FEWEST = 3  # different pictures with a part at the same place; two agree by chance too often
MIN_EDGES = 8  # pairs of neighbouring cells in a region with that contrast
CHUNK = 4096  # pairs of pictures that are compared at once
BLOCKS = 1 << 15  # blocks, or pairs of them, that are computed with at once
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours of a cell, in a stack of thumbnails
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

MEMBERS = 64  # rows with a part that tell which cells are its own
AGREED = 0.75  # share of these rows that must agree in a cell of the part
SHARE = 0.5  # share of a part's cells that a row must show
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


def shared_regions(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Regions that are equal and not flat in two of many thumbnails ``(n, cells, cells, 3)`` uint8.

    In a large group of pictures that share a part not every pair is there, but the pairs connect them all. Returned are
    the two rows of each region, ``(k,)`` each, and where it is, ``(k, cells, cells)`` bool.
    """
    a, b = _candidate_pairs(thumbnails)
    parts = list(slices(len(a), CHUNK)) or [slice(0, 0)]
    found = [equal_regions(thumbnails[a[part]], thumbnails[b[part]]) for part in parts]
    pairs = np.concatenate([which + part.start for part, (which, _, _) in zip(parts, found, strict=True)])
    masks, edges = (np.concatenate([of[i] for of in found]) for i in (1, 2))
    fewest = by_chance(thumbnails[np.union1d(a[pairs], b[pairs])])
    large = edges >= fewest
    return a[pairs[large]], b[pairs[large]], masks[large], fewest


def by_chance(thumbnails: np.ndarray) -> float:
    """Edges of the regions that pictures of a kind share by chance: of all but ``RARELY`` of the pairs no more.

    One picture of a pair is shifted along a line or a column, so that a part that many show at one place does not
    count, and lines of text, bars or squares that lie on one grid in every picture do.
    """
    if len(thumbnails) < 2:
        return 0.0
    rng, side = np.random.default_rng(len(thumbnails)), thumbnails.shape[1]
    a = rng.integers(0, len(thumbnails), CHUNK)
    b = (a + rng.integers(1, len(thumbnails), CHUNK)) % len(thumbnails)
    shifted, most = thumbnails[b], np.zeros(CHUNK)
    shifts, axes = rng.integers(SHIFT, side - SHIFT + 1, CHUNK), rng.integers(0, 2, CHUNK)
    for i, (shift, axis) in enumerate(zip(shifts, axes, strict=True)):
        shifted[i] = np.roll(shifted[i], shift, axis)
    which, _, edges = equal_regions(thumbnails[a], shifted)
    np.maximum.at(most, which, edges)
    return float(np.quantile(most, 1 - RARELY))


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


def equal_regions(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regions that are equal and not flat in two stacks of thumbnails: the pair of each, its cells as bool, its edges.

    A region is what lies round its edges: a white ground alone does not connect what stands on it.
    """
    return _regions(x, equal_cells(x, y))


def _regions(x: np.ndarray, equal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = _edges(x, equal)
    enough = np.flatnonzero(edges.sum((1, 2)) >= MIN_EDGES)
    x, equal, edges = x[enough], equal[enough], edges[enough]
    wholes, number = ndimage.label(equal, IN_PLANE)
    large = np.bincount(wholes.ravel(), edges.ravel(), number + 1) >= MIN_EDGES
    large[0] = False
    labels, number = ndimage.label(_in_blocks(x, equal & large[wholes]), IN_PLANE)
    per_region = np.bincount(labels.ravel(), edges.ravel(), number + 1)
    planes = np.searchsorted(np.maximum.accumulate(labels.max((1, 2), initial=0)), np.arange(1, number + 1))
    return enough[planes], labels[planes] == np.arange(1, number + 1)[:, None, None], per_region[1:]


def _in_blocks(x: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """The equal cells ``(k, cells, cells)`` that are in blocks (``SHAPES``) which are equal as a whole and not flat."""
    inside = np.zeros_like(equal)
    for shape in SHAPES:
        varies = (_windows(x, shape, np.maximum) - _windows(x, shape, np.minimum)).max(-1) >= CONTRAST
        whole = _windows(equal, shape, np.logical_and) & varies
        for top, left in np.ndindex(shape):
            inside[:, top : top + whole.shape[1], left : left + whole.shape[2]] |= whole
    return inside


def _windows(values: np.ndarray, shape: tuple[int, int], of: np.ufunc) -> np.ndarray:
    """The largest or smallest value of every block of a shape, ``(k, cells - height + 1, cells - width + 1, ...)``."""
    for axis, size in enumerate(shape, 1):
        along = np.moveaxis(values, axis, 0)
        values = np.moveaxis(reduce(of, (along[i : len(along) - size + 1 + i] for i in range(size))), 0, axis)
    return values


def _edges(pictures: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """For each cell, with how many of its four neighbours it has contrast, both in the equal part, halved."""
    edges = np.zeros(equal.shape, dtype=np.float32)
    for axis in (1, 2):
        values = np.moveaxis(pictures, axis, 1)
        step = _farthest(values[:, 1:], values[:, :-1])
        both = np.moveaxis(equal, axis, 1)
        edge = (step >= CONTRAST) & both[:, 1:] & both[:, :-1]
        for side in (slice(1, None), slice(None, -1)):
            np.moveaxis(edges, axis, 1)[:, side] += edge / 2
    return edges


def _farthest(x: np.ndarray, y: np.ndarray) -> Any:
    """The largest difference along the last axis of two uint8 arrays."""
    return (np.maximum(x, y) - np.minimum(x, y)).max(-1, initial=0)


def at_same_place(parts: Sequence[Part], thumbnails: np.ndarray, rows: np.ndarray, fewest: float) -> list[Part]:
    """The parts that are one picture with so many edges, each with those of ``rows`` that show it at the same place.

    ``thumbnails`` are of all rows. A row that is only connected to others by what it shares with one is left out.
    """
    known = [typical for part in parts if (typical := _typical(part, thumbnails, fewest))[1].any()]
    found: list[Part] = [{} for _ in known]
    for some in np.array_split(rows, len(rows) // ROWS + 1):
        pictures = thumbnails[some]
        by_cell = np.ascontiguousarray(pictures.transpose(1, 2, 0, 3))
        for part, (picture, mask) in zip(found, known, strict=True):
            probed = spaced(np.argwhere(mask).tolist(), PROBED)
            near = np.zeros(len(some), dtype=int)
            for y, x in probed:
                near += equal_cells(by_cell[y, x], picture[y, x])
            likely = np.flatnonzero(near >= SHARE * len(probed))
            shown = np.zeros((len(likely), *mask.shape), dtype=bool)
            equal = equal_cells(pictures[likely], picture) & mask
            which, masks, edges = _regions(np.broadcast_to(picture, pictures[likely].shape), equal)
            np.logical_or.at(shown, which[edges >= fewest], masks[edges >= fewest])
            for i in np.flatnonzero(shown.sum((1, 2)) >= SHARE * mask.sum()):
                part[int(some[likely[i]])] = box_of(shown[i])
    return [part for part in found if len(part) >= FEWEST]


def _typical(part: Part, thumbnails: np.ndarray, fewest: float) -> tuple[np.ndarray, np.ndarray]:
    """The median of the pictures with a part, and its regions with more than ``fewest`` edges that most agree in."""
    some = spaced(sorted(part), MEMBERS)
    pictures = thumbnails[some]
    picture = np.median(pictures, axis=0).astype(np.uint8)
    within = np.any([inside(part[row], len(picture)) for row in some], axis=0)
    agreed = within & (equal_cells(pictures, picture).mean(0) >= AGREED)
    _, masks, edges = _regions(picture[None], agreed[None])
    shown: Any = masks[edges >= fewest].any(0)
    return picture, shown


def shared_area(a: Box, b: Box) -> float:
    """The area that two boxes share, as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0
