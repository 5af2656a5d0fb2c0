"""Sinks: where reports go. A sink is ``write(report)`` and ``close()``; a failing one costs only its own row.

After three failures in a row a sink rests, and is tried again at every tenth event; see ``faults``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from memwatch.faults import Faults
from memwatch.report.files import FileSink
from memwatch.report.history import HISTORY
from memwatch.report.losses import LossSink
from memwatch.report.overview import overview_of
from memwatch.report.picture import pictures_of
from memwatch.report.report import Report
from memwatch.report.retention import is_shown
from memwatch.report.terminal import Console

DRAWING = "drawing the pictures"
MISSING = "what it was to get of the events in between is missing"


class Sink(Protocol):
    """One place that reports are written to."""

    name: str

    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """The files, one sink per accelerate tracker, and the console. Lives on every process, writes on the main one.

    Args:
        files: always written first.
        faults: counts what fails.
        more: written last.
    """

    def __init__(self, files: FileSink, faults: Faults, more: Sequence[Sink] = ()) -> None:
        self.files, self.losses, self.faults, self.more = files, LossSink(files.folder), faults, tuple(more)
        self._trackers: list[Any] | None = None
        self._of_trackers: dict[int, Sink] = {}

    def write(self, report: Report, trackers: Sequence[Any]) -> Report:
        """Draw the pictures, and write to every sink that does not rest.

        Trackers get no pictures where they have many already, see ``is_shown``.

        Args:
            trackers: they are looked at once, at the first report.

        Returns:
            The report with its pictures.
        """
        if self._trackers is None:
            self._trackers = [tracker for tracker in trackers if tracker.name != "memwatch"]
        if not self.faults.is_resting(DRAWING):
            with self.faults.surviving(DRAWING, missing="the pictures of the events in between are missing"):
                report = replace(report, pictures=pictures_of(report))
                report = replace(report, overview=overview_of(report))
        if not self._write(self.files.name, lambda: self.files, report, self.files.missing):
            self.files.hold(replace(report, errors=self.faults.count))
        self._write_to(self.losses, report)
        shown = is_shown(self.files.rank)
        of_trackers = report if shown else replace(report, pictures={}, overview=None)
        for i, tracker in enumerate(self._trackers):
            self._write(tracker.name, partial(self._of_tracker, i, tracker), of_trackers)
        self._write(Console.name, Console, report)
        for sink in self.more:
            self._write_to(sink, report)
        return report

    def _write_to(self, sink: Sink, report: Report) -> None:
        """To a sink that is there already."""
        self._write(sink.name, lambda: sink, report)

    def _write(self, name: str, sink: Callable[[], Sink], report: Report, missing: str = MISSING) -> bool:
        """Returns whether it was tried."""
        part = f"the sink '{name}'"
        if self.faults.is_resting(part):
            return False
        with self.faults.surviving(part, missing=missing):
            sink().write(replace(report, errors=self.faults.count))
        return True

    def _of_tracker(self, i: int, tracker: Any) -> Sink:
        """The tracker's sink, made at its first report or, where that failed, at a later one."""
        if i not in self._of_trackers:
            self._of_trackers[i] = tracker_sink(tracker, self.faults)
        return self._of_trackers[i]

    def close(self) -> None:
        """Close every sink, and write the report page of what this process has written."""
        sinks: list[Sink] = [self.files, self.losses, *self._of_trackers.values(), *self.more]
        for sink in sinks:
            with self.faults.surviving(f"closing the sink '{sink.name}'", "what it wrote before stays"):
                sink.close()
        if self._trackers is not None and (self.files.folder / HISTORY).is_file():
            from memwatch.report.page import write_page  # jinja2 waits until it is needed

            with self.faults.surviving("writing the report page", "'memwatch report' writes it at any time"):
                write_page(self.files.folder)


def tracker_sink(tracker: Any, faults: Faults) -> Sink:
    """The sink of an accelerate tracker: TensorBoard and W&B by their own adapters, any other by ``TrackerSink``."""
    from memwatch.report.tensorboard import TensorBoardSink
    from memwatch.report.trackers import TrackerSink
    from memwatch.report.wandb import WandbSink

    known: dict[str, Callable[[Any], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}
    return known[tracker.name](tracker) if tracker.name in known else TrackerSink(tracker, faults)
