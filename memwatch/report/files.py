"""Always: ``history.jsonl`` (one line per event), maps as safetensors, pictures as PNG.

What the report page and every command that reads a run rest on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.measure.weights import write_safetensors
from memwatch.report.about import About
from memwatch.report.history import ABOUT, HISTORY
from memwatch.report.lines import append, read_lines, rewrite
from memwatch.report.report import Report
from memwatch.run_folder import write_json


class FileSink:
    """Writes below ``folder``; nothing is created before the first report.

    | file | holds |
    |---|---|
    | ``about.json`` | the run: see ``About`` |
    | ``history.jsonl`` | one line per event: see ``Report.to_dict`` |
    | ``maps/step_NNNNNNN.safetensors`` | ``PROBE/SIGNAL`` and its error ``PROBE/SIGNAL.sem``, ``(levels, h, w)`` |
    | ``heatmaps/PROBE/step_NNNNNNN.png``, ``overview/step_NNNNNNN.png`` | the pictures of people's dashboards |
    | ``images/PROBE.png``, of prompt probes ``images/PROBE/step_NNNNNNN.png`` | what was looked at |
    | ``generations/PROBE/step_NNNNNNN.png`` | a proof's generations, side by side |

    The map that decides, ``PROBE/decisive``, is ``(h, w)``. ``memwatch/act`` adds ``flagged.jsonl``, the rows behind
    every alert, and ``last_clean/``, the weights of before the first one, where a run has ended after one.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._about: About | None = None
        self._images: set[str] = set()

    def write(self, report: Report) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if report.about != self._about:
            write_json(self.folder / ABOUT, report.about.to_dict())
            self._about = report.about
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

    def rewind(self, step: int) -> None:
        """Forget events after ``step``: training goes on from an earlier checkpoint."""
        if (path := self.folder / HISTORY).is_file():
            rewrite(path, [row for row in read_lines(path) if row["step"] <= step])

    def close(self) -> None:
        """Every file is closed after its write."""
