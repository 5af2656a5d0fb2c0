"""Any other accelerate tracker: the scalars, and beside them pictures and alerts in the tracker's own way.

``ADAPTERS`` lists the trackers whose own way is known; every other one gets the scalars alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from memwatch.faults import Faults
from memwatch.judge.verdict import Verdict
from memwatch.report.history import why
from memwatch.report.report import Report


class Shown(NamedTuple):
    """A picture as a dashboard shows it: its key, see the table in ``report``, and what it says in words."""

    key: str
    caption: str
    image: Image.Image


def shown_of(report: Report) -> list[Shown]:
    """The overview, and the picture of every probe that is news or has evidence; each where it was drawn."""
    shown = []
    if report.overview is not None:
        caption = f"step {report.step}: {report.to_event().counts()}"
        shown.append(Shown("memwatch/overview", caption, report.overview))
    for f in report.findings:
        if f.is_worth_a_look and f.name in report.pictures:
            caption = f"{f.observation.probe.title}, {f.verdict}. {why(f)}"
            shown.append(Shown(f"memwatch/heatmap/{f.name}", caption, report.pictures[f.name]))
    return shown


def alerts_of(report: Report) -> dict[str, str]:
    """The text of every alert, by its key."""
    return {f"memwatch/alert/{f.name}": report.alert_text(f) for f in report.alerts}


def ascii_key(key: str) -> str:
    """The key in ASCII letters, digits and ``_ - . / space``; any other character becomes ``_`` and its code in hex."""
    return re.sub(r"[^\w\-./ ]", lambda other: f"_{ord(other[0]):x}", key, flags=re.ASCII)


def to_mlflow(tracker: Any, report: Report) -> None:
    """Images of the model metrics tab, which has a slider over steps, and alerts as text artifacts."""
    from mlflow import MlflowClient

    client, run_id = MlflowClient(), tracker.tracker.info.run_id
    for shown in shown_of(report):
        client.log_image(run_id, shown.image, key=ascii_key(shown.key), step=report.step)
    for key, text in alerts_of(report).items():
        client.log_text(run_id, text, f"{ascii_key(key)}/step_{report.step:07d}.txt")


def to_swanlab(tracker: Any, report: Report) -> None:
    """One row of images and texts."""
    import swanlab

    row: dict[str, Any] = {s.key: swanlab.Image(s.image, caption=s.caption) for s in shown_of(report)}
    row |= {key: swanlab.Text(text) for key, text in alerts_of(report).items()}
    if row:
        tracker.tracker.log(row, step=report.step)


def to_trackio(tracker: Any, report: Report) -> None:
    """One row of images, and alerts as Trackio's alerts."""
    import trackio

    run = tracker.tracker
    if row := {s.key: trackio.Image(s.image, caption=s.caption) for s in shown_of(report)}:
        run.log(row, step=report.step)
    for f in report.alerts:
        level = trackio.AlertLevel.ERROR if f.verdict is Verdict.MEMORIZED else trackio.AlertLevel.WARN
        title = f"memwatch: {f.observation.probe.title} is {f.verdict}"
        run.alert(title, report.alert_text(f), level=level, step=report.step)


ADAPTERS: dict[str, Callable[[Any, Report], None]] = {
    "mlflow": to_mlflow,
    "swanlab": to_swanlab,
    "trackio": to_trackio,
}


class TrackerSink:
    """Scalars by the tracker's ``log``, pictures and alerts by its adapter.

    Pictures that fail cost no scalars: a server that takes numbers may have no store for files.

    Args:
        tracker: accelerate's; ``tracker.tracker`` is the library's own run.
        faults: counts pictures that fail, and lets them rest.
    """

    def __init__(self, tracker: Any, faults: Faults) -> None:
        self.name = str(tracker.name)
        self._tracker, self._faults = tracker, faults

    def write(self, report: Report) -> None:
        self._tracker.log(report.scalars(), step=report.step)
        adapter, part = ADAPTERS.get(self.name), f"the pictures of the sink '{self.name}'"
        if adapter is not None and not self._faults.is_resting(part):
            with self._faults.surviving(part, missing="those of the events in between are missing"):
                adapter(self._tracker, report)

    def close(self) -> None:
        """accelerate finishes its trackers itself."""
