"""Always: ``history.jsonl`` (one line per event), maps as safetensors, pictures as JPEG.

What the report page and every command that reads a run rest on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.measure.weights import write_safetensors
from memwatch.report.about import About
from memwatch.report.history import ABOUT, HISTORY, Event
from memwatch.report.jsonl import append_text, read_lines, rewrite, to_text
from memwatch.report.report import Report
from memwatch.report.retention import Kept, Retention, stem_of
from memwatch.run_folder import write_json

JPEG: dict[str, Any] = {"quality": 90, "subsampling": 0}  # a quarter of a PNG's bytes, and the map's squares stay sharp
HELD = 500  # lines of history that wait for a disk with room


class FileSink:
    """Writes below ``folder``; nothing is created before the first report.

    | file | holds |
    |---|---|
    | ``about.json`` | the run: see ``About`` |
    | ``history.jsonl`` | one line per event: see ``Report.to_dict`` |
    | ``maps/step_NNNNNNN.safetensors`` | ``PROBE/SIGNAL``, its error ``PROBE/SIGNAL.sem``, float32 ``(levels, h, w)`` |
    | ``heatmaps/PROBE/step_NNNNNNN.jpg``, ``overview/step_NNNNNNN.jpg`` | the pictures of people's dashboards |
    | ``images/PROBE.png``, of prompt probes ``images/PROBE/step_NNNNNNN.jpg`` | what was looked at |
    | ``generations/PROBE/step_NNNNNNN.jpg`` | a proof's generations, side by side |

    The map that decides, ``PROBE/decisive``, is ``(h, w)``. ``memwatch/act`` adds ``flagged.jsonl``, the rows behind
    every alert, and ``last_clean/``, the weights of before the first one, where a run has ended after one.

    The line of every event stays: about 1 kB per probe. Files named by a step take 500 MB at most over all events, or
    those of the newest event if they alone are more; ``retention`` says which stay. What a full disk refuses is lost,
    but for the lines: the newest ``HELD`` of them wait until there is room.

    Attributes:
        rank: of the newest event, see ``Kept``.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder, self.retention = folder, Retention(folder)
        self._about: About | None = None
        self._images: set[str] = set()
        self.rank = 0
        self._held: list[str] = []
        self._lost = 0

    @property
    def missing(self) -> str:
        """What is lost for good, for people, if the next event can be written."""
        lost = self._lost + max(0, len(self._held) + 1 - HELD)
        lines = f", and the numbers of {lost}" if lost else ""
        return f"pictures and maps of the events in between are missing{lines}"

    def hold(self, report: Report) -> Kept:
        """Note an event; its line is written with the next one that can be."""
        line = report.to_dict()
        self._held.append(to_text([line]))
        self._lost += len(self._held[:-HELD])
        self._held = self._held[-HELD:]
        event = self.retention.begin(report.step, Event.from_dict(line).has_news)
        self.rank = event.rank
        return event

    def write(self, report: Report) -> None:
        event, stem = self.hold(report), stem_of(report.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        if report.about != self._about:
            write_json(self.folder / ABOUT, report.about.to_dict())
            self._about = report.about
        self._write_lines()
        try:
            self._write_maps(report, event)
            for name, picture in report.pictures.items():
                self._save(picture, event, "heatmaps", name, f"{stem}.jpg")
            if report.overview is not None:
                self._save(report.overview, event, "overview", f"{stem}.jpg")
            for finding in report.findings:
                self._write_images(finding, event)
        finally:
            self.retention.thin()

    def _write_lines(self) -> None:
        """One by one, so that what is written is held no longer."""
        while self._held:
            append_text(self.folder / HISTORY, self._held[0])
            del self._held[0]
        self._lost = 0

    def _write_maps(self, report: Report, event: Kept) -> None:
        maps: dict[str, torch.Tensor] = {}
        for finding in report.findings:
            for key, value in (finding.signals.maps() if finding.signals else {}).items():
                maps[f"{finding.name}/{key}"] = value.mean.float()
                maps[f"{finding.name}/{key}.sem"] = value.sem.float()
        if maps:
            file = self.folder / "maps" / f"{stem_of(report.step)}.safetensors"
            write_safetensors(file, maps)
            event.files[file] = file.stat().st_size

    def _write_images(self, finding: Finding, event: Kept) -> None:
        """What was looked at, and what a proof has generated. A training image is the same at every event."""
        name, image, file = finding.name, finding.observation.image, f"{stem_of(event.step)}.jpg"
        if image is not None and not finding.observation.probe.is_reference:
            self._save(Image.fromarray(image), event, "images", name, file)
        elif image is not None and name not in self._images:
            self._save(Image.fromarray(image), None, "images", f"{name}.png")
            self._images.add(name)
        if finding.proof is not None:
            side_by_side = np.concatenate(list(finding.proof.generations), axis=1)
            self._save(Image.fromarray(side_by_side), event, "generations", name, file)

    def _save(self, picture: Image.Image, event: Kept | None, *parts: str) -> None:
        """Write a picture.

        Args:
            event: that it belongs to; ``None`` for the whole run.
        """
        file = self.folder.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        if event is None:
            return picture.save(file)
        event.files[file] = 0  # a part of it may lie there already when the disk is full
        picture.save(file, **JPEG)
        event.files[file] = file.stat().st_size

    def rewind(self, step: int) -> None:
        """Forget events after ``step``: training goes on from an earlier checkpoint."""
        rows = [row for row in read_lines(self.folder / HISTORY) if row["step"] <= step]
        if (self.folder / HISTORY).is_file():
            rewrite(self.folder / HISTORY, rows)
        self._held = [line for line in self._held if json.loads(line)["step"] <= step]
        events = map(Event.from_dict, [*rows, *map(json.loads, self._held)])
        self.retention.rewind(step, [(event.step, event.has_news) for event in events])

    def close(self) -> None:
        """Write the lines that have waited; every other file is closed after its write."""
        self._write_lines()
