"""Where reports go. A sink is ``write(report)`` and ``close()``; a failing one costs only its own row.

After three failures in a row a sink rests, and is tried again at every tenth event; see ``faults``. Accelerate finishes
its trackers itself, so that their sinks have nothing to close.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from memwatch.faults import Faults
from memwatch.judge.verdict import Verdict
from memwatch.report.files import FileSink, LossSink
from memwatch.report.history import HISTORY, Event, read_lines
from memwatch.report.pictures import overview_of, picture_of
from memwatch.report.report import Report
from memwatch.report.retention import is_shown
from memwatch.report.text import HEAD, cells_of, markdown_table, summary
from memwatch.report.wandb import WandbSink
from memwatch.run_folder import stem_of

logger = logging.getLogger("memwatch")

DRAWING = "drawing the pictures"
MISSING = "it has no rows and pictures of the events in between"
CONTROLS = [f"memwatch/control_severity{end}" for end in ("_median", "_least", "")]  # the line, and the band's ends
SEVERITIES = ["memwatch/severity/.+"]
LAYOUT = {  # of the tab "Custom Scalars"; a multiline chart's tags are regular expressions
    "memwatch": {
        "severity of every probe": ["Multiline", SEVERITIES],
        "severity of the controls: least, median, largest": ["Margin", CONTROLS],
        "share of training time that memwatch takes": ["Multiline", ["memwatch/overhead$"]],
    }
}


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
        self._of_trackers: dict[int, TensorBoardSink | TrackerSink | WandbSink] = {}

    def write(self, report: Report, trackers: Sequence[Any]) -> Report:
        """Draw the pictures, and write to every sink that does not rest; returns the report with its pictures.

        ``trackers``: of the accelerator, as they are at the first report. They get no pictures where they have many
        already, see ``is_shown``.
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


# --- trackers ---------------------------------------------------------------------------------------------------------


def sink_of(tracker: Any, faults: Faults) -> TensorBoardSink | TrackerSink | WandbSink:
    if tracker.name == "wandb":
        return WandbSink(tracker)
    return TensorBoardSink(tracker) if tracker.name == "tensorboard" else TrackerSink(tracker, faults)


class TensorBoardSink:
    """Scalars and their charts, an image tag per probe and for the overview, histograms, all alerts as one table."""

    def __init__(self, tracker: Any) -> None:
        self._writer, self._has_layout = tracker.tracker, False

    def write(self, report: Report) -> None:
        writer, step = self._writer, report.step
        if not self._has_layout:
            writer.add_custom_scalars(LAYOUT)
            self._has_layout = True
            folder = getattr(writer, "log_dir", None) or writer.logdir  # torch's writer, or tensorboardX's
            command = f"tensorboard --samples_per_plugin images=1000 --logdir {folder}"
            logger.info("TensorBoard keeps ten pictures per probe unless it is started by: %s", command)
        for key, value in report.scalars().items():
            writer.add_scalar(key, value, step)
        for key, picture in report.images().items():
            writer.add_image(key, np.asarray(picture), step, dataformats="HWC")
        for f in report.findings:
            if f.signals is not None and f.signals.heatmap is not None:
                factors = np.exp(f.signals.heatmap.mean.double().numpy().ravel())
                if (finite := np.isfinite(factors)).any():
                    writer.add_histogram(f"memwatch/map/{f.name}", factors[finite], step)
        if report.alerts:  # the table holds those of the history as well, also from before a resume
            rows = read_lines(Path(report.config.output_dir) / HISTORY)
            events = [*(Event.from_dict(row) for row in rows if row["step"] < step), report.event]
            alerts = [(str(e.step), *cells_of(row)) for e in events for row in e.rows if row.alert]
            writer.add_text("memwatch/alerts", "\n".join(markdown_table([("step", *HEAD), *alerts])), step)
        writer.flush()


class TrackerSink:
    """Scalars by the tracker's ``log``, pictures and alerts by its adapter.

    Pictures that fail cost no scalars: a server that takes numbers may have no store for files.
    """

    def __init__(self, tracker: Any, faults: Faults) -> None:
        self._tracker, self._faults = tracker, faults

    def write(self, report: Report) -> None:
        name = self._tracker.name
        self._tracker.log(report.scalars(), step=report.step)
        adapter, part = ADAPTERS.get(name), f"the pictures of the sink '{name}'"
        if adapter is not None and not self._faults.is_resting(part):
            with self._faults.surviving(part, missing="those of the events in between are missing"):
                adapter(self._tracker, report)


def shown_of(report: Report) -> dict[str, tuple[Image.Image, str]]:
    """The overview, and the picture of every probe that is news or has evidence, by key, with what it says in words."""
    words = {f"memwatch/heatmap/{f.name}": report.rows[f.name].caption for f in report.findings if f.is_worth_a_look}
    words["memwatch/overview"] = f"step {report.step}: {report.event.counts()}"
    return {key: (image, words[key]) for key, image in report.images().items() if key in words}


def ascii_key(key: str) -> str:
    """The key in ASCII letters, digits and ``_ - . / space``; any other character becomes ``_`` and its code in hex."""
    return re.sub(r"[^\w\-./ ]", lambda other: f"_{ord(other[0]):x}", key, flags=re.ASCII)


def to_mlflow(tracker: Any, report: Report) -> None:
    """Images of the model metrics tab, which has a slider over steps, and alerts as text artifacts."""
    from mlflow import MlflowClient

    client, run_id = MlflowClient(), tracker.tracker.info.run_id
    for key, (image, _) in shown_of(report).items():
        client.log_image(run_id, image, key=ascii_key(key), step=report.step)
    for f in report.alerts:
        key = ascii_key(f"memwatch/alert/{f.name}")
        client.log_text(run_id, report.alert_text(f), f"{key}/{stem_of(report.step)}.txt")


def to_swanlab(tracker: Any, report: Report) -> None:
    """One row of images and texts."""
    import swanlab

    row: dict[str, Any] = {key: swanlab.Image(image, caption=words) for key, (image, words) in shown_of(report).items()}
    row |= {f"memwatch/alert/{f.name}": swanlab.Text(report.alert_text(f)) for f in report.alerts}
    if row:
        tracker.tracker.log(row, step=report.step)


def to_trackio(tracker: Any, report: Report) -> None:
    """One row of images, and alerts as Trackio's alerts."""
    import trackio

    if row := {key: trackio.Image(image, caption=words) for key, (image, words) in shown_of(report).items()}:
        tracker.tracker.log(row, step=report.step)
    for f in report.alerts:
        level = trackio.AlertLevel.ERROR if f.verdict is Verdict.MEMORIZED else trackio.AlertLevel.WARN
        title = f"memwatch: {f.observation.probe.title} is {f.verdict}"
        tracker.tracker.alert(title, report.alert_text(f), level=level, step=report.step)


ADAPTERS: dict[str, Callable[[Any, Report], None]] = {"mlflow": to_mlflow, "swanlab": to_swanlab, "trackio": to_trackio}
