"""Guard: where memwatch meets the training loop.

The guarded dataloader ends a run, and a tracker that logs nothing hears when accelerate ends training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate.tracking import GeneralTracker


class GuardedLoader:
    """A dataloader that takes the baseline before its first batch and ends as soon as a stop is decided.

    Everything else is the wrapped dataloader's own, its type for ``isinstance`` included. Wrap it *after*
    ``skip_first_batches``, which makes a new dataloader.
    """

    def __init__(self, dataloader: Any, begin: Callable[[], object], should_stop: Callable[[], bool]) -> None:
        self._dataloader, self._begin, self._should_stop = dataloader, begin, should_stop

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        if self._should_stop():
            return
        for batch in self._dataloader:
            yield batch
            if self._should_stop():
                return

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":  # not set yet: unpickling or copying
            raise AttributeError(name)
        return getattr(self._dataloader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._dataloader.__class__  # accelerate's own loaders say DataLoader here, too


class EndTrainingHook(GeneralTracker):  # type: ignore[misc]
    """Hears ``accelerator.end_training()``, which finishes every tracker, and passes it on. Logs nothing."""

    name = "memwatch"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__()
        self._close = close

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def finish(self) -> None:
        self._close()


def hook_end_training(accelerator: Any, close: Callable[[], None]) -> None:
    """Put an ``EndTrainingHook`` among the trackers, which live on the main process, unless there is one."""
    if accelerator.is_main_process and not any(tracker.name == "memwatch" for tracker in accelerator.trackers):
        accelerator.trackers.append(EndTrainingHook(close))
