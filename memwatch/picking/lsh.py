"""Small pieces that are almost equal, among very many: by random projections, sorted, then checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHUNK = 1 << 15  # pieces or pairs that are computed with at once

Check = Callable[[np.ndarray, np.ndarray], np.ndarray]


def keys_of(values: np.ndarray, directions: int, width: float, seed: list[int]) -> np.ndarray:
    """Keys that almost equal pieces probably share.

    Args:
        values: ``(n, d)`` uint8.
        directions: random directions that a key is made of.
        width: how far pieces may lie apart along a direction and still share a key, levels of 0..255.
        seed: another one gives other keys.

    Returns:
        ``(n,)`` int64.
    """
    rng = np.random.default_rng(seed)
    axes = rng.standard_normal((values.shape[1], directions)).astype(np.float32)
    axes /= np.linalg.norm(axes, axis=0)
    begin, factors = rng.random(directions, dtype=np.float32), rng.integers(1, 2**62, directions)
    keys = np.zeros(len(values), dtype=np.int64)
    with np.errstate(over="ignore"):
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            steps = np.floor(values[part] @ axes / width + begin).astype(np.int64)
            keys[part] = (steps * factors).sum(1)
    return keys


def pairs_with_first(keys: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Each piece with the ``first`` lowest of its key and with the one before it; the larger number first.

    A key of k pieces costs k pairs, not k squared, and where all are equal, all hang together.
    """
    order = np.argsort(keys, kind="stable")
    sorted_ = keys[order]
    start, place = np.searchsorted(sorted_, sorted_), np.arange(len(keys))
    a = np.tile(place, first + 1)
    b = np.concatenate([*(start + i for i in range(first)), place - 1])
    paired = (b < a) & (b >= np.tile(start, first + 1))
    return order[a[paired]], order[b[paired]]


def pairs_with_next(keys: np.ndarray, along: np.ndarray, following: int) -> tuple[np.ndarray, np.ndarray]:
    """Each piece with those that follow it among the pieces of its key, in the order of ``along``.

    That finds the few equal ones among many others with the same key.
    """
    order = np.lexsort((along, keys))
    sorted_ = keys[order]
    found = []
    for step in range(1, following + 1):
        same = sorted_[step:] == sorted_[:-step]
        found.append((order[step:][same], order[:-step][same]))
    return tuple(np.concatenate(side) for side in zip(*found, strict=True))  # type: ignore[return-value]


def checked(a: np.ndarray, b: np.ndarray, holds: Check) -> tuple[np.ndarray, np.ndarray]:
    """Those pairs for which ``holds`` says so."""
    near = np.zeros(len(a), dtype=bool)
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        near[part] = holds(a[part], b[part])
    return a[near], b[near]


def farthest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The largest difference of the last axis of two uint8 arrays."""
    result: np.ndarray = (np.maximum(x, y) - np.minimum(x, y)).max(-1, initial=0)
    return result
