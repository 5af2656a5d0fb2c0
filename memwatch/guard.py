"""Guard: where memwatch meets the training loop: its dataloader, and its calls of the accelerator."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod

logger = logging.getLogger("memwatch")

MANY, TOO_MANY = 10_000, 100_000  # passes without a batch in a row: a warning, an error


class GuardedLoader:
    """A dataloader that takes the baseline before its first batch and ends as soon as a stop is decided.

    Everything else is the wrapped dataloader's own, its type for ``isinstance`` included. Wrap it *after*
    ``skip_first_batches``, which makes a new dataloader.

    A loop that counts steps, not epochs, never ends without batches, be it after a stop or because the loader is empty.
    It is warned after ``MANY`` passes in a row without a batch, and ended after ``TOO_MANY``.

    Args:
        begin: takes the baseline, unless there is one.
        should_stop: whether a stop is decided.
        on_batch: called before every batch.

    Raises:
        RuntimeError: in iteration, after ``TOO_MANY`` passes in a row without a batch.
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
        if self._empty_passes not in (MANY + 1, TOO_MANY):
            return
        said = f"the dataloader has given no batch in {self._empty_passes} passes; see its batch size and drop_last"
        if self._should_stop():
            fix = "write 'while global_step < max_steps and not watch.should_stop:'"
            said = f"training was stopped, but the loop goes on without batches; {fix}"
        if self._empty_passes == TOO_MANY:
            raise RuntimeError(f"memwatch: {said}")
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
    """Call the bound method ``close``, which is held weakly, before ``accelerator.end_training()``, on every rank.

    accelerate has no hook for it, and a tracker would live on the main process alone.
    """
    hook = WeakMethod(close)

    def before(*args: Any, **kwargs: Any) -> None:
        if (alive := hook()) is not None:
            alive()

    call_before(accelerator, "end_training", before)


def hook_log(accelerator: Any, note: Callable[[dict[str, Any], int], None]) -> None:
    """Call the bound method ``note(values, step)``, held weakly, before every ``accelerator.log`` with a step."""
    hook = WeakMethod(note)

    def before(values: dict[str, Any], step: int | None = None, *args: Any, **kwargs: Any) -> None:
        if step is not None and (alive := hook()) is not None:
            alive(values, step)

    call_before(accelerator, "log", before)


def call_before(accelerator: Any, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of every call of a method, ahead of the method."""
    method = getattr(accelerator, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(accelerator, name, wrapped)
