"""Always: ``history.jsonl`` (one line per event), maps as safetensors, overlays as PNG."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from memwatch.measure.weights import write_safetensors
from memwatch.report.report import Report


class FileSink:
    """Writes below ``folder``; nothing is created before the first report.

    ``history.jsonl``; ``maps/step_NNNNNNN.safetensors`` with ``PROBE/SIGNAL`` of shape ``(levels, h, w)`` and
    ``PROBE/SIGNAL.sem`` (``decisive``: ``(h, w)``); ``heatmaps/PROBE/step_NNNNNNN.png``.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, report: Report) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as history:
            history.write(json.dumps(report.to_dict(), allow_nan=False) + "\n")
            history.flush()
        maps: dict[str, torch.Tensor] = {}
        for finding in report.findings:
            for key, value in (finding.signals.maps() if finding.signals else {}).items():
                maps[f"{finding.name}/{key}"] = value.mean.float()
                maps[f"{finding.name}/{key}.sem"] = value.sem.float()
        if maps:
            write_safetensors(self.folder / "maps" / f"step_{report.step:07d}.safetensors", maps)
        for name, picture in report.pictures.items():
            file = self.folder / "heatmaps" / name / f"step_{report.step:07d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)

    def rewind(self, step: int) -> None:
        """Forget events after ``step``: training goes on from an earlier checkpoint."""
        path = self.folder / "history.jsonl"
        if not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)

    def close(self) -> None:
        """Every file is closed after its write."""


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a crash
        return float("inf")
