"""Sinks: where reports go. A sink is ``write(report)`` and ``close()``; a failing one costs only its own row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.report import Report


class Sink(Protocol):
    """One place that reports are written to."""

    name: str

    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """The files, and one sink per accelerate tracker. Lives on every process, writes on the main one.

    Args:
        files: always written first.
        faults: counts what fails.
    """

    def __init__(self, files: FileSink, faults: Faults) -> None:
        self.files, self.faults = files, faults
        self._of_trackers: list[Sink] | None = None

    def write(self, report: Report, trackers: Sequence[Any]) -> None:
        """Write to every sink that is not switched off. ``trackers`` are looked at once, at the first report."""
        if self._of_trackers is None:
            self._of_trackers = tracker_sinks(trackers)
        for sink in (self.files, *self._of_trackers):
            part = f"the sink '{sink.name}'"
            if not self.faults.is_off(part):
                with self.faults.surviving(part):
                    sink.write(replace(report, errors=self.faults.count))

    def close(self) -> None:
        for sink in (self.files, *(self._of_trackers or ())):
            with self.faults.surviving(f"closing the sink '{sink.name}'", "what it wrote before stays"):
                sink.close()


def tracker_sinks(trackers: Sequence[Any]) -> list[Sink]:
    """One sink per accelerate tracker: TensorBoard and W&B by their own adapters, any other by its scalars."""
    from memwatch.report.scalars import ScalarSink
    from memwatch.report.tensorboard import TensorBoardSink
    from memwatch.report.wandb import WandbSink

    known: dict[str, Callable[[Any], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return [known.get(tracker.name, ScalarSink)(tracker) for tracker in trackers if tracker.name != "memwatch"]
