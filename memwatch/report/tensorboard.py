"""TensorBoard: scalars, one image tag per probe (so that the step slider scrubs one probe), alerts as text.

TensorBoard shows ten steps an image tag unless started with ``--samples_per_plugin images=1000``; the files in
``output_dir`` hold all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memwatch.report.report import Report


class TensorBoardSink:
    name = "tensorboard"

    def __init__(self, tracker: Any) -> None:
        self._writer = tracker.tracker

    def write(self, report: Report) -> None:
        for key, value in report.scalars().items():
            self._writer.add_scalar(key, value, report.step)
        for name, picture in report.pictures.items():
            self._writer.add_image(f"memwatch/heatmap/{name}", np.asarray(picture), report.step, dataformats="HWC")
        for finding in report.alerts:
            text = report.alert_text(finding).replace("\n", "  \n")  # markdown's line break
            self._writer.add_text(f"memwatch/alert/{finding.name}", text, report.step)
        self._writer.flush()

    def close(self) -> None:
        """accelerate finishes its trackers itself."""
