"""memwatch as an accelerate tracker, for trainers that accept nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from memwatch.callback import MemWatch

logger = logging.getLogger("memwatch")


class MemWatchTracker(GeneralTracker):  # type: ignore[misc]
    """Takes every ``accelerator.log(values, step)`` for the end of an optimizer step.

    Use it so::

        watch = MemWatchTracker(lambda: MemWatch(accelerator, unet, "path/to/pipeline", probes=...))
        accelerator = Accelerator(log_with=["wandb", watch])

    A tracker cannot do everything:

    - It works with one process only, because trackers live on the main process.
    - It takes the first baseline when something is first logged, after one or more steps. For LoRA,
      ``signals.baseline: base`` needs no such baseline.
    - It cannot end training. Read ``tracker.watch.should_stop`` where the trainer lets you.
    - It passes over values that are logged without a step.

    Args:
        make: makes the ``MemWatch``. It is called at the first ``log``, so it may name what does not exist yet.

    Raises:
        ValueError: at the first ``log``, with more than one process.
    """

    name = "memwatch"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, make: Callable[[], MemWatch]) -> None:
        super().__init__()
        self._make = make
        self.watch: MemWatch | None = None

    @property
    def tracker(self) -> MemWatch | None:
        return self.watch

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is None:
            return
        if self.watch is None:
            if (count := PartialState().num_processes) > 1:  # MemWatch would wait for the others, which never log
                why = "only the main one logs; call watch.on_step_end instead"
                raise ValueError(f"MemWatchTracker works with one process, not {count}: {why}")
            self.watch = self._make()
            self.watch.note_losses(values, step)  # those that come later it hears by itself
        stopped = self.watch.should_stop
        self.watch.on_step_end(step)
        if self.watch.should_stop and not stopped:
            logger.warning("training would stop here, but a tracker cannot end it: %s", self.watch.stop_reason)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def finish(self) -> None:
        if self.watch is not None:
            self.watch.close()
