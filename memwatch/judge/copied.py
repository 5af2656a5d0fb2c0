"""Copied: what a caption generates, and from when on that is a copy.

A copy is a fact beside the verdict: something can be stored, and not come out in four generations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COPY = 1 / 3  # of the distance to the nearest other picture; below is a copy


@dataclass(frozen=True)
class Proof:
    """What a prompt generates, RGB uint8 ``(n, H, W, 3)``, and how near that is to what memwatch watches.

    Attributes:
        ratios: of each generation, see ``copy_ratios`` and, of a prompt probe, ``sibling_ratios`` in ``proof.copies``.
        copies: for each generation, the names of the watched probes that it copies.
        num_others: how many other pictures there were, without their views.
        grade: of all generations, at most 1: 0 is chance, 1 is identical, see ``proof.copies.grade_of``; or ``None``.
    """

    generations: np.ndarray
    ratios: tuple[float, ...]
    copies: tuple[tuple[str, ...], ...]
    num_others: int
    grade: float | None = None

    @property
    def is_copy(self) -> tuple[bool, ...]:
        """For each generation, whether it copies the probe."""
        return tuple(ratio < COPY for ratio in self.ratios)

    @property
    def copied(self) -> int:
        """How many generations copy the probe."""
        return sum(self.is_copy)
