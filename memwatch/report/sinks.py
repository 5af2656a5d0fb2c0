"""Where reports go. A sink is ``write(report)`` and ``close()``; a failing one costs only its own row.

After three failures in a row a sink rests, and is tried again at every tenth event; see ``faults``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from tqdm.auto import tqdm

from memwatch.faults import Faults
from memwatch.report.files import FileSink, LossSink
from memwatch.report.history import HISTORY
from memwatch.report.pictures import overview_of, picture_of
from memwatch.report.report import Report
from memwatch.report.retention import is_shown
from memwatch.report.text import summary
from memwatch.report.trackers import AnyTrackerSink, sink_of

DRAWING = "drawing the pictures"
MISSING = "it has no rows and pictures of the events in between"


class Sink(Protocol):
    """One place that reports are written to."""

    name: str

    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """The files, which are written first, one sink per accelerate tracker, the console, and ``more``.

    It lives on every process and writes on the main one.
    """

    def __init__(self, files: FileSink, faults: Faults, more: Sequence[Sink] = ()) -> None:
        self.files, self.losses, self.faults, self.more = files, LossSink(files.folder), faults, tuple(more)
        self._trackers: list[Any] | None = None
        self._of_trackers: dict[int, AnyTrackerSink] = {}

    def write(self, report: Report, trackers: Sequence[Any]) -> Report:
        """Draw the pictures, and write to every sink that does not rest; returns the report with its pictures.

        Those are the accelerator's ``trackers`` at the first report; where they have many pictures already, see
        ``is_shown``, they get none.
        """
        if self._trackers is None:
            self._trackers = [tracker for tracker in trackers if tracker.name != "memwatch"]
        if not self.faults.is_resting(DRAWING):
            with self.faults.surviving(DRAWING, missing="the pictures of the events in between are missing"):
                shown = [f for f in report.findings if f.observation.image is not None]
                pictures = {f.name: picture_of(report, f) for f in shown}
                report = replace(report, pictures=pictures, overview=overview_of(report))
        lost = "pictures and maps of the events in between are missing"
        if not self._write(self.files.name, self.files.write, report, lost):
            self.files.hold(replace(report, errors=self.faults.count))
        of_trackers = report if is_shown(self.files.rank) else replace(report, pictures={}, overview=None)
        for i, tracker in enumerate(self._trackers):
            self._write(tracker.name, partial(self._to_tracker, i, tracker), of_trackers)
        self._write(self.losses.name, self.losses.write, report)
        self._write("console", lambda report: tqdm.write(summary(report.event, report.about)), report)
        for sink in self.more:
            self._write(sink.name, sink.write, report)
        return report

    def _write(self, name: str, write: Callable[[Report], None], report: Report, missing: str = MISSING) -> bool:
        """Whether it was tried."""
        part = f"the sink '{name}'"
        if self.faults.is_resting(part):
            return False
        with self.faults.surviving(part, missing=missing):
            write(replace(report, errors=self.faults.count))
        return True

    def _to_tracker(self, i: int, tracker: Any, report: Report) -> None:
        """By the tracker's sink, which is made at its first report or, where that failed, at a later one."""
        if i not in self._of_trackers:
            self._of_trackers[i] = sink_of(tracker, self.faults)
        self._of_trackers[i].write(report)

    def close(self) -> None:
        """Close every sink, and write the report page of what this process has written."""
        sinks: list[Sink] = [self.files, self.losses, *self.more]
        for sink in sinks:
            with self.faults.surviving(f"closing the sink '{sink.name}'", "what it wrote before stays"):
                sink.close()
        if self._trackers is not None and (self.files.folder / HISTORY).is_file():
            from memwatch.report.page import write_page  # jinja2 waits until it is needed

            with self.faults.surviving("writing the report page", "'memwatch report' writes it at any time"):
                write_page(self.files.folder)
