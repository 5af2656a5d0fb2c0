"""Near-duplicates: pictures of a set that are the same but for compression, size or mirroring.

The perceptual hashes of two near-duplicates differ in few bits, and their thumbnails in little. Only the nearest in a
tree of small thumbnails are compared, so that the time grows as n log n. Where more than ``NEIGHBOURS`` pictures might
be near-duplicates of one, the search is repeated among one picture of each group, until no two groups become one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from memwatch.picking.grouping import by_label, components, slices
from memwatch.picking.hashes import Hashes

MAX_BITS = 10  # of 64 in which the hashes of near-duplicates differ
MAX_DIFFERENCE = 0.05  # mean squared difference of two thumbnails, relative to how much each varies
NOISE = 8.0  # levels of 0..255 that a plain picture varies by
FINE = 16  # cells per side that thumbnails are compared at
COARSE = 8  # cells per side of what the nearest are looked for by
AXES = 16  # principal axes of that
NEIGHBOURS = 16  # pictures that a picture is compared with, the nearest, and as many mirrored
ROUNDS = 8  # repetitions of the search at most
BAND = 1.1  # pictures that vary alike within this factor are looked for at one distance, which is faster
BLOCK = 512  # rows that are computed with at once


def duplicate_groups(hashes: Hashes) -> list[tuple[int, ...]]:
    """Groups of two or more rows that show the same picture, mirrored ones too; largest group first, then by row.

    In a large group not every pair is looked at, but those that are connect all members.
    """
    readable = hashes.readable
    first = _first_of_equals(hashes, readable)
    is_equal = first != readable
    a, b = readable[is_equal], first[is_equal]
    search, crowded = _Search(hashes, readable), readable[~is_equal]
    number, among = len(hashes), crowded
    for _ in range(ROUNDS):
        more_a, more_b, crowded = search.pairs(crowded, among)
        a, b = np.concatenate([a, more_a]), np.concatenate([b, more_b])
        labels = components(len(hashes), a, b)
        among = crowded[np.unique(labels[crowded], return_index=True)[1]]
        before, number = number, int(labels.max(initial=-1)) + 1
        if number == before or len(among) < 2:
            break
    groups = [tuple(map(int, rows)) for rows in by_label(labels) if len(rows) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def difference(a: np.ndarray, b: np.ndarray) -> Any:
    """How different thumbnails ``(k, CELLS, CELLS, 3)`` are, relative to what is in them.

    0 is the same, 1 is as any two pictures. Two plain pictures are the same only if their colours are.
    """
    squared = ((_pooled(a, FINE) - _pooled(b, FINE)) ** 2).mean((1, 2, 3))
    return squared / ((_spread(a) + _spread(b)) / 2 + NOISE**2)


def bits_apart(a: np.ndarray, b: np.ndarray) -> Any:
    """In how many bits hashes differ, ``(..., 8)`` uint8 each."""
    return np.unpackbits(a ^ b, axis=-1).sum(-1)


def coarse(thumbnails: np.ndarray) -> np.ndarray:
    """``(n, COARSE * COARSE * 3)`` float32 of thumbnails."""
    small = np.zeros((len(thumbnails), COARSE * COARSE * 3), np.float32)
    for some in slices(len(small), BLOCK):
        small[some] = _pooled(thumbnails[some], COARSE).reshape(len(small[some]), -1)
    return small


class _Search:
    """Finds what is near in a space of few dimensions, in which no distance is larger than between thumbnails."""

    def __init__(self, hashes: Hashes, readable: np.ndarray) -> None:
        self.hashes = hashes
        small = coarse(hashes.thumbnails)
        centred = small[readable] - small[readable].mean(0)
        axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, -AXES:].astype(np.float32)
        mirrored = small.reshape(-1, COARSE, COARSE, 3)[:, :, ::-1].reshape(small.shape)
        self.plain, self.mirrored = small @ axes, mirrored @ axes
        spread = np.concatenate([_spread(hashes.thumbnails[some]) for some in slices(len(small), BLOCK)])
        self.varies = np.sqrt(spread + NOISE**2)

    def pairs(self, rows: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Near-duplicates of some rows among others, and which of the rows have more near ones than were looked at."""
        tree, crowded = cKDTree(self.plain[among]), np.zeros(len(rows), dtype=bool)
        alike = np.floor(np.log(self.varies[rows] / NOISE) / np.log(BAND)).astype(np.int64)
        found = [np.zeros(0, np.int64)]
        for is_mirrored, points in ((False, self.plain), (True, self.mirrored)):
            for some in by_label(alike):
                within = _reach(float(self.varies[rows[some]].max()))
                nearest = tree.query(points[rows[some]], NEIGHBOURS + 1, distance_upper_bound=within)
                apart, others = (np.asarray(values) for values in nearest)
                crowded[some] |= np.isfinite(apart[:, -1])
                i, j = np.nonzero(np.isfinite(apart))
                found.append(self._confirmed(rows[some[i]], among[others[i, j]], is_mirrored))
        codes = np.unique(np.concatenate(found))
        return codes // len(self.hashes), codes % len(self.hashes), rows[crowded]

    def _confirmed(self, a: np.ndarray, b: np.ndarray, is_mirrored: bool) -> np.ndarray:
        """Those pairs that are near-duplicates, as one number each."""
        size, hashes = len(self.hashes), self.hashes
        codes: np.ndarray = np.unique(np.maximum(a, b)[a != b] * size + np.minimum(a, b)[a != b])
        a, b = codes // size, codes % size
        bits = hashes.mirrored if is_mirrored else hashes.whole
        near = np.flatnonzero(bits_apart(bits[a], hashes.whole[b]) <= MAX_BITS)
        codes, a, b = codes[near], a[near], b[near]
        holds = np.zeros(len(a), dtype=bool)
        for part in slices(len(a), BLOCK):
            mine = hashes.thumbnails[a[part]]
            mine = mine[:, :, ::-1] if is_mirrored else mine
            holds[part] = difference(mine, hashes.thumbnails[b[part]]) <= MAX_DIFFERENCE
        return codes[holds]


def _reach(varies: float) -> float:
    """How far apart the coarse thumbnails of near-duplicates may be, if one varies by so much or less.

    Let the two vary by a and b. Their squared difference is ``MAX_DIFFERENCE`` (a² + b²) / 2 at most, and (a - b)² at
    least, so that b / a has a largest value. Pooling and projecting make nothing larger.
    """
    half = MAX_DIFFERENCE / 2
    ratio = (1 + np.sqrt(1 - (1 - half) ** 2)) / (1 - half)
    return float(varies * np.sqrt(half * (1 + ratio**2) * COARSE * COARSE * 3) * (1 + 1e-3))  # rounding


def _first_of_equals(hashes: Hashes, rows: np.ndarray) -> np.ndarray:
    """For each of ``rows`` the first that has the very same hashes and thumbnail."""
    first: dict[bytes, int] = {}
    fields = (hashes.whole, hashes.mirrored, hashes.thumbnails)
    keys = (hashlib.blake2b(b"".join(field[row].tobytes() for field in fields), digest_size=16) for row in rows)
    return np.array([first.setdefault(key.digest(), int(row)) for key, row in zip(keys, rows, strict=True)], np.int64)


def _spread(thumbnails: np.ndarray) -> Any:
    """How much each thumbnail varies: squared levels, mean over channels."""
    return _pooled(thumbnails, FINE).var((1, 2)).mean(-1)


def _pooled(thumbnails: np.ndarray, side: int) -> Any:
    """Means of squares: ``(n, side, side, 3)`` float32."""
    step = thumbnails.shape[1] // side
    blocks = thumbnails.reshape(len(thumbnails), side, step, side, step, 3)
    total = np.zeros((len(thumbnails), side, side, 3), np.float32)
    for i, j in np.ndindex(step, step):
        total += blocks[:, :, i, :, j]
    return total / np.float32(step * step)
