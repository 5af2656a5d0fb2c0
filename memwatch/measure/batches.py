"""Batches: work through rows as many at a time as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")
Done = TypeVar("Done")


def in_batches(rows: Sequence[Row], size: int, work: Callable[[Sequence[Row]], Iterable[Done]]) -> list[Done]:
    """What ``work`` makes of every row, in order. When memory runs out the batch is halved.

    Args:
        size: rows at a time, at least 1.
        work: one result for each row of a batch.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    done: list[Done] = []
    while len(done) < len(rows):
        batch = rows[len(done) : len(done) + size]
        try:
            done += work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            torch.cuda.empty_cache()
    return done
