"""Any accelerate tracker: scalars."""

from __future__ import annotations

from typing import Any

from memwatch.report.report import Report


class ScalarSink:
    def __init__(self, tracker: Any) -> None:
        self.name = str(tracker.name)
        self._tracker = tracker

    def write(self, report: Report) -> None:
        self._tracker.log(report.scalars(), step=report.step)

    def close(self) -> None:
        """accelerate finishes its trackers itself."""
