"""Groups and portions of numbered things: connected ones, equal ones, so many at once, some of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def components(size: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number of each element's component, given pairs that belong together."""
    pairs = a.astype(np.int32), b.astype(np.int32)  # scipy before 1.13 asks for that, and finds nothing otherwise
    graph = coo_array((np.ones(len(a), dtype=bool), pairs), shape=(size, size))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def by_label(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each label, rising; labels in order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def slices(number: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` that cover ``number`` elements."""
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def spaced(values: Sequence[Any], number: int) -> list[Any]:
    """So many of them at most, evenly spaced."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(number, len(values))).astype(int))]
