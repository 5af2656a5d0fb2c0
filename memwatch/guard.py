"""Guard: where memwatch meets the training loop.

The guarded dataloader ends a run, and memwatch hears what is logged and when accelerate ends training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod

logger = logging.getLogger("memwatch")

MANY, TOO_MANY = 10_000, 100_000  # passes without a batch; an epoch loop of 10,000 that was stopped ends quietly


class GuardedLoader:
    """A dataloader that takes the baseline before its first batch and ends as soon as a stop is decided.

    Batches, sampler and length are the wrapped dataloader's own, and so is everything else, its type for ``isinstance``
    included. Wrap it *after* ``skip_first_batches``, which makes a new dataloader.

    A loop that counts steps and not epochs goes round for ever where there are no batches, after a stop or in a loader
    that is empty: it is warned after ``MANY`` such passes in a row.

    Args:
        begin: takes the baseline, unless there is one.
        should_stop: whether a stop is decided.
        on_batch: called before a batch is given.

    Raises:
        RuntimeError: when it is iterated over, after ``TOO_MANY`` passes in a row without a batch.
    """

    def __init__(
        self,
        dataloader: Any,
        begin: Callable[[], object],
        should_stop: Callable[[], bool],
        on_batch: Callable[[], object] = lambda: None,
    ) -> None:
        self._dataloader, self._begin, self._should_stop, self._on_batch = dataloader, begin, should_stop, on_batch
        self._empty_passes = 0  # in a row

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        self._empty_passes += 1
        if not self._should_stop():
            for batch in self._dataloader:
                self._empty_passes = 0
                self._on_batch()
                yield batch
                if self._should_stop():
                    return
        self._warn_of_empty_passes()

    def _warn_of_empty_passes(self) -> None:
        """A stop is never taken back, so that all passes after it are empty."""
        if self._empty_passes in (MANY + 1, TOO_MANY):
            stopped = "memwatch has stopped training, but the loop goes on without batches"
            empty = f"the dataloader has given no batch in {self._empty_passes} passes, and the loop goes on"
            fix = "write 'while global_step < max_steps and not watch.should_stop:'"
            said = (
                f"{stopped}; {fix}" if self._should_stop() else f"{empty}; see its data set, batch size and drop_last"
            )
            if self._empty_passes == TOO_MANY:
                raise RuntimeError(said)
            logger.warning(said)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":  # not set yet: unpickling or copying
            raise AttributeError(name)
        return getattr(self._dataloader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._dataloader.__class__  # accelerate's own loaders say DataLoader here, too


def rows_per_device(dataloader: Any, num_processes: int) -> int | None:
    """Rows of one batch on one device; ``None`` where the dataloader does not say.

    >>> from torch.utils.data import DataLoader
    >>> rows_per_device(DataLoader([1, 2, 3, 4], batch_size=2), num_processes=1)
    2
    """
    total = getattr(dataloader, "total_batch_size", None)  # accelerate's loaders
    rows = total // num_processes if isinstance(total, int) else getattr(dataloader, "batch_size", None)
    return max(1, rows) if isinstance(rows, int) else None


def rows_in(dataloader: Any) -> int | None:
    """Rows of a dataloader's data set; ``None`` where it does not say.

    >>> from torch.utils.data import DataLoader
    >>> rows_in(DataLoader([1, 2, 3, 4], batch_size=2))
    4
    """
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError):
        return None


def hook_end_training(accelerator: Any, close: Callable[[], None]) -> None:
    """Call the bound method ``close`` first when ``accelerator.end_training()`` is called, on every rank.

    accelerate has no hook for it. A tracker that hears it would live on the main process alone, and scripts that walk
    over their trackers warn of one that they do not know. Its object is held weakly.
    """
    hook = WeakMethod(close)

    def before(*args: Any, **kwargs: Any) -> None:
        if (alive := hook()) is not None:
            alive()

    call_before(accelerator, "end_training", before)


def hook_log(accelerator: Any, note: Callable[[dict[str, Any], int], None]) -> None:
    """Call the bound method ``note(values, step)`` first at every ``accelerator.log`` with a step; held weakly."""
    hook = WeakMethod(note)

    def before(values: dict[str, Any], step: int | None = None, *args: Any, **kwargs: Any) -> None:
        if step is not None and (alive := hook()) is not None:
            alive(values, step)

    call_before(accelerator, "log", before)


def call_before(accelerator: Any, name: str, before: Callable[..., None]) -> None:
    """Let ``before`` hear every call of a method, with its arguments, ahead of the method itself."""
    method = getattr(accelerator, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(accelerator, name, wrapped)
