"""Guard: where memwatch meets the training loop.

The guarded dataloader ends a run, and memwatch hears what is logged and when accelerate ends training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakMethod

logger = logging.getLogger("memwatch")

MANY, TOO_MANY = 10_000, 100_000  # passes without a batch after a stop; an epoch loop of 10,000 ends quietly


class Place:
    """How far the guarded dataloader has come.

    Attributes:
        batches: given so far in all. passes: begun so far. in_pass: batches of the current one.
    """

    def __init__(self) -> None:
        self.batches = self.passes = self.in_pass = 0
        self._dataloader: Any = None
        self._of_this = 0  # batches that this dataloader has given
        self._goes_on = False  # the next pass is one that a checkpoint was taken in

    def begin_pass(self, dataloader: Any) -> None:
        """A pass over this dataloader begins; after a resume it is the rest of one."""
        self._dataloader, self._of_this = dataloader, 0
        if not self._goes_on:
            self.passes, self.in_pass = self.passes + 1, 0
        self._goes_on = False

    def count(self) -> None:
        """A batch is given."""
        self.batches, self.in_pass, self._of_this = self.batches + 1, self.in_pass + 1, self._of_this + 1

    @property
    def is_at_end(self) -> bool:
        """Whether the current pass has given its last batch."""
        if self._dataloader is None:
            return False
        ended = getattr(self._dataloader, "end_of_dataloader", None)  # accelerate's loaders look one batch ahead
        return bool(ended) if ended is not None else self._of_this >= len(self._dataloader)

    @property
    def next(self) -> tuple[int, int]:
        """The pass that the next batch belongs to, 0 is the first, and how many batches of it were given already."""
        between = self._dataloader is None and not self._goes_on  # before the first pass, and after a resume there
        if between or self.is_at_end:
            return self.passes, 0
        return self.passes - 1, self.in_pass

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        number, given = self.next
        return {"batches": self.batches, "pass": number, "in_pass": given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from ``state``: the next pass is the one that it was taken in, less what was given of it."""
        self.batches, self.in_pass = state.get("batches", 0), state.get("in_pass", 0)
        self._goes_on, self._dataloader = self.in_pass > 0, None
        self.passes = state.get("pass", 0) + self._goes_on


class GuardedLoader:
    """A dataloader that takes the baseline before its first batch and ends as soon as a stop is decided.

    Args:
        place: keeps count of passes and batches, over all guarded dataloaders of a run.

    After a stop a pass over it gives no batch. A loop that counts steps and not epochs would go round for ever: the
    loader warns after ``MANY`` such passes. Everything else is the wrapped dataloader's own, its type for
    ``isinstance`` included. Wrap it *after* ``skip_first_batches``, which makes a new dataloader.

    Raises:
        RuntimeError: when it is iterated over, after ``TOO_MANY`` passes without a batch.
    """

    def __init__(
        self,
        dataloader: Any,
        begin: Callable[[], object],
        should_stop: Callable[[], bool],
        place: Place | None = None,
    ) -> None:
        self._dataloader, self._begin, self._should_stop = dataloader, begin, should_stop
        self._place, self._empty_passes = place or Place(), 0

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        if self._should_stop():
            self._count_empty_pass()
            return
        self._place.begin_pass(self._dataloader)
        for batch in self._dataloader:
            self._place.count()
            yield batch
            if self._should_stop():
                return

    def _count_empty_pass(self) -> None:
        """A stop is never taken back, so that all passes after it are empty."""
        self._empty_passes += 1
        if self._empty_passes in (MANY + 1, TOO_MANY):
            fix = "write 'while global_step < max_steps and not watch.should_stop:'"
            said = f"memwatch has stopped training, but the loop goes on without batches; {fix}"
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
