"""Batches: work through rows as many at a time as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

Row = TypeVar("Row")
Done = TypeVar("Done")


class Batches:
    """Batches of one kind of work. The size that fits is found once and kept for the rest of the run.

    When memory runs out the batch is halved. A single row that does not fit is tried once more, and all that follow
    with it, inside ``sparing``.

    The size of a batch changes rounding, since it chooses kernels. While it stays, a model that is compared with itself
    reads exactly 0. What was kept from before it shrank differs from what is measured now by rounding alone: in float32
    about 1e-6 of the largest values.

    Args:
        size: rows at a time, at least 1.
        sparing: what makes the work take less memory and more time, while it is entered; ``None`` where nothing does.

    Attributes:
        size: as it is now.
        spares: whether ``sparing`` is needed.
    """

    def __init__(self, size: int, sparing: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        self.size, self.spares, self._sparing = size, False, sparing

    def limit(self, rows: int) -> None:
        """From now on no more than ``rows`` at a time; below 1 it is one, inside ``sparing``."""
        self.size, self.spares = max(1, min(self.size, rows)), self.spares or rows < 1

    def run(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Iterable[Done]]) -> list[Done]:
        """What ``work`` makes of every row, in order.

        Args:
            work: one result for each row of a batch.

        Raises:
            torch.OutOfMemoryError: one row alone does not fit.
        """
        done: list[Done] = []
        while len(done) < len(rows):
            batch = rows[len(done) : len(done) + self.size]
            found = self._tried(batch, work)
            if found is not None:
                done += found
            else:
                self.spares, self.size = self.spares or len(batch) == 1, max(1, len(batch) // 2)
                torch.cuda.empty_cache()  # here, where nothing holds on to what the failed batch computed
        return done

    def _tried(self, batch: Sequence[Row], work: Callable[[Sequence[Row]], Iterable[Done]]) -> list[Done] | None:
        """``None`` where memory ran out and there is something left to try."""
        try:
            with self._sparing() if self.spares and self._sparing is not None else nullcontext():
                return list(work(batch))
        except torch.OutOfMemoryError:
            if len(batch) == 1 and (self.spares or self._sparing is None):
                raise
        return None
