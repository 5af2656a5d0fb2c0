"""Accelerate's trackers: the scalars, and beside them pictures and alerts in the tracker's own way.

W&B and TensorBoard have sinks of their own, ``ADAPTERS`` lists the other trackers whose own way is known, and every
other one gets the scalars alone. Accelerate finishes its trackers itself, so their sinks have nothing to close.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.faults import Faults
from memwatch.judge.verdict import Verdict
from memwatch.report.history import HISTORY, Event, read_lines
from memwatch.report.report import Report
from memwatch.report.text import HEAD, cells_of, markdown_table
from memwatch.report.wandb import WandbSink

logger = logging.getLogger("memwatch")

CONTROLS = [f"memwatch/control_severity{end}" for end in ("_median", "_least", "")]  # the line, and the band's ends
LAYOUT = {  # of the tab "Custom Scalars"; a multiline chart's tags are regular expressions
    "memwatch": {
        "severity of every probe, and the alert level": [
            "Multiline",
            ["memwatch/severity/.+", "memwatch/alert_level$"],
        ],
        "severity of the controls: least, median, largest": ["Margin", CONTROLS],
        "share of training time that memwatch takes": ["Multiline", ["memwatch/overhead$"]],
    }
}


def sink_of(tracker: Any, faults: Faults) -> AnyTrackerSink:
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
            if f.signals is not None and f.signals.decisive is not None:
                factors = np.exp(f.signals.decisive.mean.double().numpy().ravel())
                if (finite := np.isfinite(factors)).any():
                    writer.add_histogram(f"memwatch/map/{f.name}", factors[finite], step)
        if report.alerts:  # the table holds those of the history as well, also from before a resume
            rows = read_lines(Path(report.config.output_dir) / HISTORY)
            events = [*(Event.from_dict(row) for row in rows if row["step"] < step), report.event]
            alerts = [(str(e.step), *cells_of(row)) for e in events for row in e.rows if row.alert]
            writer.add_text("memwatch/alerts", "\n".join(markdown_table([("step", *HEAD), *alerts])), step)
        writer.flush()


# --- other trackers ---------------------------------------------------------------------------------------------------


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
        client.log_text(run_id, report.alert_text(f), f"{key}/step_{report.step:07d}.txt")


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
AnyTrackerSink = TensorBoardSink | TrackerSink | WandbSink
