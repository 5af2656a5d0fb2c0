"""What every run leaves in ``output_dir``: the report page and every command that reads a run rest on these files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.measure.weights import write_safetensors
from memwatch.report.about import About
from memwatch.report.history import ABOUT, HISTORY, LOSSES, Event
from memwatch.report.jsonl import append, read_lines, rewrite
from memwatch.report.report import Report
from memwatch.report.retention import Kept, Retention, stem_of
from memwatch.run_folder import write_json

JPEG: dict[str, Any] = {"quality": 90, "subsampling": 0}  # a quarter of a PNG's bytes, and the map's squares stay sharp
HELD = 500  # lines of history that wait for a disk with room
HELD_OUT = {"val", "valid", "validation", "eval", "evaluation", "test"}  # how loops name what is not trained on
OTHERWISE = {"divergence"}  # of the training loss, as some loops log it beside


class FileSink:
    """Writes below ``folder``; nothing is created before the first report.

    | file | holds |
    |---|---|
    | ``about.json`` | the run: see ``About`` |
    | ``history.jsonl`` | one line per event: see ``Report.to_dict`` |
    | ``maps/step_NNNNNNN.safetensors`` | ``PROBE/SIGNAL``, its error ``PROBE/SIGNAL.sem``, float32 ``(levels, h, w)`` |
    | ``heatmaps/PROBE/step_NNNNNNN.jpg``, ``overview/step_NNNNNNN.jpg`` | the pictures of people's dashboards |
    | ``images/PROBE.png``, of prompt probes ``images/PROBE/step_NNNNNNN.jpg`` | the images that were measured |
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
        self._held: list[dict[str, Any]] = []

    def hold(self, report: Report) -> Kept:
        """Note an event; its line is written with the next one that can be."""
        line = report.to_dict()
        self._held = [*self._held, line][-HELD:]
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
            append(self.folder / HISTORY, self._held[:1])
            del self._held[0]

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
        """The image that was measured, and what a proof has generated. A training image is the same at every event."""
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
        """Write a picture of an event, or of the whole run."""
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
        self._held = [line for line in self._held if line["step"] <= step]
        events = map(Event.from_dict, [*rows, *self._held])
        self.retention.rewind(step, [(event.step, event.has_news) for event in events])

    def close(self) -> None:
        """Write the lines that have waited; every other file is closed after its write."""
        self._write_lines()


class LossSink:
    """Writes ``losses.jsonl``: ``step``, ``key`` and ``value`` of one validation loss per line.

    Nothing is written before the first report: until then the folder may hold the files of another run.

    Attributes:
        count: how many losses the run has noted so far. A checkpoint keeps it.
    """

    name = "losses"

    def __init__(self, folder: Path) -> None:
        self.file, self.count = folder / LOSSES, 0
        self._unwritten: list[dict[str, Any]] = []
        self._is_ours = False

    def note(self, values: Mapping[str, Any], step: int) -> None:
        """Keep the validation losses among what the loop logs.

        Raises:
            OSError: the disk refused; they are written with those that follow.
        """
        found = {key: _as_number(value) for key, value in values.items() if is_validation_loss(key)}
        rows = [{"step": int(step), "key": key, "value": value} for key, value in found.items() if value is not None]
        self._unwritten += rows
        self.count += len(rows)
        self.close()

    def write(self, report: Report) -> None:
        """The folder is this run's from now on."""
        self._is_ours = True
        self.close()

    def rewind(self, count: int) -> None:
        """Forget all losses but the first ``count`` of the run: training goes on from an earlier checkpoint."""
        self._is_ours, self._unwritten = True, []
        rows = read_lines(self.file)
        if len(rows) > count:
            rewrite(self.file, rows[:count])
        self.count = min(count, len(rows))

    def close(self) -> None:
        """Write what has waited."""
        if self._is_ours and self._unwritten:
            append(self.file, self._unwritten)
            self._unwritten = []


def is_validation_loss(key: str) -> bool:
    """Whether a logged key names a loss on data that is not trained on.

    >>> [is_validation_loss(key) for key in ("val_loss", "loss/validation/step_average", "train_loss", "latest_loss")]
    [True, True, False, False]
    """
    words = set(re.split(r"[^a-z]+", key.lower()))
    return "loss" in words and bool(words & HELD_OUT) and not words & OTHERWISE


def _as_number(value: Any) -> float | None:
    """A number, also of a tensor that holds one; ``None`` for anything else, and where it is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
