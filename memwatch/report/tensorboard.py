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

from memwatch.report.history import HISTORY, Event
from memwatch.report.jsonl import read_lines
from memwatch.report.report import Report
from memwatch.report.text import HEAD, cells_of, markdown_table

logger = logging.getLogger("memwatch")

LAYOUT = {  # of the tab "Custom Scalars"; a multiline chart's tags are regular expressions
    "memwatch": {
        "severity of every probe, and the alert level": [
            "Multiline",
            ["memwatch/severity/.+", "memwatch/alert_level$"],
        ],
        "severity of the controls: least, median, largest": [
            "Margin",
            [f"memwatch/control_severity{end}" for end in ("_median", "_least", "")],  # the line, and the band's ends
        ],
        "share of training time that memwatch takes": ["Multiline", ["memwatch/overhead$"]],
    }
}


class TensorBoardSink:
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
