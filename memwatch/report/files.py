"""Always: ``history.jsonl`` (one line per event), maps as safetensors, pictures as PNG.

What the report page and every command that reads a run rest on.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.measure.weights import write_safetensors
from memwatch.report.about import About
from memwatch.report.history import ABOUT, HISTORY, LOSSES, read_lines
from memwatch.report.report import Report
from memwatch.run_folder import write_json

HELD_OUT = r"(val|valid|validation|eval|test)"  # how loops name what is not trained on
VALIDATION_LOSS = re.compile(rf"(^|[^a-z]){HELD_OUT}[^a-z].*loss|loss[^a-z](.*[^a-z])?{HELD_OUT}($|[^a-z])")


class FileSink:
    """Writes below ``folder``; nothing is created before the first report.

    | file | holds |
    |---|---|
    | ``about.json`` | the run: see ``About`` |
    | ``history.jsonl`` | one line per event: see ``Report.to_dict`` |
    | ``losses.jsonl`` | validation losses that the loop logged, one per line: ``step``, ``key``, ``value`` |
    | ``maps/step_NNNNNNN.safetensors`` | ``PROBE/SIGNAL`` and its error ``PROBE/SIGNAL.sem``, ``(levels, h, w)`` |
    | ``heatmaps/PROBE/step_NNNNNNN.png``, ``overview/step_NNNNNNN.png`` | the pictures of people's dashboards |
    | ``images/PROBE.png``, of prompt probes ``images/PROBE/step_NNNNNNN.png`` | what was looked at |
    | ``generations/PROBE/step_NNNNNNN.png`` | a proof's generations, side by side |

    The map that decides, ``PROBE/decisive``, is ``(h, w)``.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._about: About | None = None
        self._images: set[str] = set()
        self._losses: list[dict[str, Any]] = []

    def write(self, report: Report) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if report.about != self._about:
            write_json(self.folder / ABOUT, report.about.to_dict())
            self._about = report.about
        self._write_losses()
        append(self.folder / HISTORY, [report.to_dict()])
        self._write_maps(report)
        for name, picture in report.pictures.items():
            self._save(picture, "heatmaps", name, f"step_{report.step:07d}.png")
        if report.overview is not None:
            self._save(report.overview, "overview", f"step_{report.step:07d}.png")
        for finding in report.findings:
            self._write_images(finding, report.step)

    def _write_maps(self, report: Report) -> None:
        maps: dict[str, torch.Tensor] = {}
        for finding in report.findings:
            for key, value in (finding.signals.maps() if finding.signals else {}).items():
                maps[f"{finding.name}/{key}"] = value.mean.float()
                maps[f"{finding.name}/{key}.sem"] = value.sem.float()
        if maps:
            write_safetensors(self.folder / "maps" / f"step_{report.step:07d}.safetensors", maps)

    def _write_images(self, finding: Finding, step: int) -> None:
        """What was looked at, and what a proof has generated. A training image is the same at every event."""
        name, image = finding.name, finding.observation.image
        if image is not None and not finding.observation.probe.is_reference:
            self._save(Image.fromarray(image), "images", name, f"step_{step:07d}.png")
        elif image is not None and name not in self._images:
            self._save(Image.fromarray(image), "images", f"{name}.png")
            self._images.add(name)
        if finding.proof is not None:
            side_by_side = np.concatenate(list(finding.proof.generations), axis=1)
            self._save(Image.fromarray(side_by_side), "generations", name, f"step_{step:07d}.png")

    def _save(self, picture: Image.Image, *parts: str) -> None:
        file = self.folder.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)

    def note_losses(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep the validation losses among what the loop logs; they are written with the next report."""
        for key, value in values.items():
            if VALIDATION_LOSS.search(key.lower()) and isinstance(value, int | float) and math.isfinite(value):
                self._losses.append({"step": step, "key": key, "value": float(value)})

    def _write_losses(self) -> None:
        if self._losses:
            append(self.folder / LOSSES, self._losses)
            self._losses = []

    def rewind(self, step: int) -> None:
        """Forget events after ``step``: training goes on from an earlier checkpoint."""
        self._losses = [row for row in self._losses if row["step"] <= step]
        for path in (self.folder / HISTORY, self.folder / LOSSES):
            if path.is_file():
                kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= step]
                part = path.with_suffix(".part")
                part.write_text("".join(kept), encoding="utf-8")
                os.replace(part, path)

    def close(self) -> None:
        """Every file is closed after its write."""
        if self._losses and (self.folder / HISTORY).is_file():
            self._write_losses()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        file.flush()
