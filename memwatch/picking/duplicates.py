"""Near-duplicates: pictures of a set that are the same but for compression, size or mirroring."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from memwatch.picking.hashes import Hashes

MAX_BITS = 10  # of 64 in which the hashes of near-duplicates differ
MAX_DIFFERENCE = 0.05  # mean squared difference of two thumbnails, relative to how much each varies
NOISE = 8.0  # levels of 0..255 that a plain picture varies by
FINE = 16  # cells per side that thumbnails are compared at
COARSE = 8  # cells per side of what is compared with all others
BLOCK = 512  # rows that are compared with all others at once
PARTNERS = 16  # candidates of a row that are looked at from either end: a group hangs together by fewer


def duplicate_groups(hashes: Hashes) -> list[tuple[int, ...]]:
    """Groups of two or more rows that show the same picture; largest first."""
    a, b = near_pairs(hashes, hashes)
    labels = components(len(hashes), a, b)
    return groups_of(labels)


def near_pairs(first: Hashes, second: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``first`` and rows of ``second`` that are near-duplicates, mirrored ones too.

    Of two equal sets, a pair comes once, the larger number first. In a large group not every pair is there, but all
    members hang together.
    """
    found = [_confirmed(first, second, *pairs) for pairs in _candidates(first, second)]
    a, b = (np.concatenate([pair[i] for pair in found]) if found else np.zeros(0, np.int64) for i in (0, 1))
    return a, b


def components(size: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number of each element's component, given pairs that belong together."""
    pairs = a.astype(np.int32), b.astype(np.int32)  # scipy before 1.13 asks for that, and finds nothing otherwise
    graph = coo_array((np.ones(len(a), dtype=bool), pairs), shape=(size, size))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def groups_of(labels: np.ndarray) -> list[tuple[int, ...]]:
    """Elements that share a label with others; largest group first, then by their first."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []
    groups = [tuple(map(int, part)) for part in parts if len(part) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How different thumbnails are, relative to what is in them: 0 is the same, 1 is as any two pictures.

    Two plain pictures are the same only if their colours are.

    Args:
        a: ``(k, CELLS, CELLS, 3)`` uint8.
        b: likewise.
    """
    squared = ((_pooled(a, FINE) - _pooled(b, FINE)) ** 2).mean((1, 2, 3))
    result: np.ndarray = squared / ((spread_of(a) + spread_of(b)) / 2 + NOISE**2)
    return result


def spread_of(thumbnails: np.ndarray) -> np.ndarray:
    """How much each thumbnail varies: squared levels, mean over channels."""
    parts = [_pooled(thumbnails[i : i + BLOCK], FINE).var((1, 2)).mean(-1) for i in range(0, len(thumbnails), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def coarse(thumbnails: np.ndarray) -> np.ndarray:
    """``(n, COARSE * COARSE * 3)`` float32 of thumbnails."""
    return _pooled(thumbnails, COARSE).reshape(len(thumbnails), -1)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between all rows of two matrices, as a mean over their columns."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    result: np.ndarray = np.maximum(squared, 0) / a.shape[1]
    return result


def _candidates(first: Hashes, second: Hashes) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Pairs whose hashes are near, plain ones and mirrored ones, block by block."""
    same = first is second
    small_second = coarse(second.thumbnails)
    bits = _signs(second.whole)
    spread_first, spread_second = spread_of(first.thumbnails), spread_of(second.thumbnails)
    for start in range(0, len(first), BLOCK):
        rows = slice(start, start + BLOCK)
        for mirrored in (False, True):
            mine = _signs((first.mirrored if mirrored else first.whole)[rows])
            thumbnails = first.thumbnails[rows]
            small = coarse(thumbnails[:, :, ::-1] if mirrored else thumbnails)
            near = mine @ bits.T >= 64 - 2 * MAX_BITS
            limit = MAX_DIFFERENCE * ((spread_first[rows, None] + spread_second) / 2 + NOISE**2)
            near &= squared_distances(small, small_second) <= limit + 1e-2  # means of squares differ no more than these
            near &= first.readable[rows, None] & second.readable
            if same:
                near &= np.arange(len(second)) < np.arange(start, start + len(mine))[:, None]
            near &= _few(near)
            a, b = np.nonzero(near)
            yield a + start, b, mirrored


def _few(near: np.ndarray) -> np.ndarray:
    """The first and the last ``PARTNERS`` of each row."""
    if near.sum(1).max(initial=0) <= 2 * PARTNERS:
        return near
    count = near.cumsum(1, dtype=np.int32)
    return (count <= PARTNERS) | (count > count[:, -1:] - PARTNERS)


def _confirmed(
    first: Hashes, second: Hashes, a: np.ndarray, b: np.ndarray, mirrored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Those whose thumbnails are the same as well."""
    holds = np.zeros(len(a), dtype=bool)
    for start in range(0, len(a), 1024):
        part = slice(start, start + 1024)
        mine = first.thumbnails[a[part]]
        holds[part] = difference(mine[:, :, ::-1] if mirrored else mine, second.thumbnails[b[part]]) <= MAX_DIFFERENCE
    return a[holds], b[holds]


def _signs(packed: np.ndarray) -> np.ndarray:
    """Bits as float32 +1 and -1, ``(n, 64)``."""
    signs: np.ndarray = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
    return signs


def _pooled(thumbnails: np.ndarray, side: int) -> np.ndarray:
    """Means of squares: ``(n, side, side, 3)`` float32."""
    step = thumbnails.shape[1] // side
    blocks = thumbnails.reshape(len(thumbnails), side, step, side, step, 3)
    result: np.ndarray = blocks.mean((2, 4), dtype=np.float32)
    return result
