"""TensorBoard: scalars and their charts, one image tag per probe (so that the step slider scrubs one probe), one for
the overview, histograms of the maps, and all alerts as one table.

TensorBoard shows ten steps per image tag unless started with ``--samples_per_plugin images=1000``; the files in
``output_dir`` hold all.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from memwatch.report.history import HISTORY, Event, Row
from memwatch.report.jsonl import read_lines
from memwatch.report.report import Report
from memwatch.report.text import HEAD, cells_of, markdown_table

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


class TensorBoardSink:
    name = "tensorboard"

    def __init__(self, tracker: Any) -> None:
        self._writer = tracker.tracker
        self._has_layout = False

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
        pictures = {f"memwatch/heatmap/{name}": picture for name, picture in report.pictures.items()}
        if report.overview is not None:
            pictures["memwatch/overview"] = report.overview
        for tag, picture in pictures.items():
            writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        for f in report.findings:
            if f.signals is not None and f.signals.decisive is not None:
                factors = np.exp(f.signals.decisive.mean.double().numpy().ravel())
                if (finite := np.isfinite(factors)).any():
                    writer.add_histogram(f"memwatch/map/{f.name}", factors[finite], step)
        if report.alerts:
            alerts = [("step", *HEAD), *((str(step), *cells_of(row)) for step, row in alerts_until(report))]
            writer.add_text("memwatch/alerts", "\n".join(markdown_table(alerts)), step)
        writer.flush()

    def close(self) -> None:
        """accelerate finishes its trackers itself."""


def alerts_until(report: Report) -> list[tuple[int, Row]]:
    """Every alert of the run with its step: those of the history, also from before a resume, and the report's."""
    rows = read_lines(Path(report.config.output_dir) / HISTORY)
    earlier = [Event.from_dict(row) for row in rows if row["step"] < report.step]
    return [(event.step, row) for event in [*earlier, report.to_event()] for row in event.rows if row.alert]
