"""Deciding maps as files that ``memwatch eval`` compares with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memwatch.report.report import Report


class DecidingSink:
    """Writes ``step_NNNNNNN/PROBE.npy`` for each finding: the deciding map, natural log of a factor, ``(h, w)``."""

    name = "decisive"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, report: Report) -> None:
        folder = self.folder / f"step_{report.step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        for finding in report.findings:
            if finding.signals is not None and finding.signals.decisive is not None:
                np.save(folder / f"{finding.name}.npy", finding.signals.decisive.mean.numpy())

    def close(self) -> None:
        """Every file is closed after its write."""
