"""What every run leaves in ``output_dir``: the report page and every command that reads a run rest on these files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.measure.weights import write_safetensors
from memwatch.report.about import About
from memwatch.report.history import ABOUT, HISTORY, LOSSES, Event, append, read_lines, rewrite
from memwatch.report.report import Report
from memwatch.report.retention import Kept, Retention
from memwatch.run_folder import stem_of, write_json

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

    ``PROBE/decisive``, the map that decides, and ``PROBE/heatmap`` are ``(h, w)``. ``memwatch/act`` adds
    ``flagged.jsonl``, the rows behind
    every alert, and ``last_clean/``, the newest weights from before the first one.

    The line of every event stays: about 1 kB per probe. Files named by a step take 500 MB at most over all events, or
    those of the newest event if they alone are more; ``retention`` says which stay. What a full disk refuses is lost,
    but for the lines: the newest ``HELD`` of them wait until there is room. ``rank`` is the newest event's in ``Kept``.
    """

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder, self.retention, self.rank = folder, Retention(folder), 0
        self._about: About | None = None
        self._images: set[str] = set()
        self._held: list[dict[str, Any]] = []

    def hold(self, report: Report) -> Kept:
        """Note an event; its line is written with the next one that can be."""
        self._held = [*self._held, report.to_dict()][-HELD:]
        event = self.retention.begin(report.step, report.event.has_news)
        self.rank = event.rank
        return event

    def write(self, report: Report) -> None:
        event, file = self.hold(report), f"{stem_of(report.step)}.jpg"
        self.folder.mkdir(parents=True, exist_ok=True)
        if report.about != self._about:
            write_json(self.folder / ABOUT, asdict(report.about))
            self._about = report.about
        self.close()
        try:
            self._write_maps(report, event)
            for name, picture in report.pictures.items():
                self._save(picture, event, "heatmaps", name, file)
            if report.overview is not None:
                self._save(report.overview, event, "overview", file)
            self._write_images(report, event, file)
        finally:
            self.retention.thin()

    def _write_maps(self, report: Report, event: Kept) -> None:
        signals = {f.name: f.signals.maps() for f in report.findings if f.signals is not None}
        maps = {f"{name}/{key}": value for name, found in signals.items() for key, value in found.items()}
        tensors = {key: value.mean.float() for key, value in maps.items()}
        tensors |= {f"{key}.sem": value.sem.float() for key, value in maps.items()}
        if maps:
            file = self.folder / "maps" / f"{stem_of(report.step)}.safetensors"
            write_safetensors(file, tensors)
            event.files[file] = file.stat().st_size

    def _write_images(self, report: Report, event: Kept, file: str) -> None:
        """The images that were measured, and what proofs have generated. A training image is always the same."""
        for f in report.findings:
            if f.observation.image is not None:
                picture = Image.fromarray(f.observation.image)
                if not f.observation.probe.is_reference:
                    self._save(picture, event, "images", f.name, file)
                elif f.name not in self._images:
                    self._save(picture, None, "images", f"{f.name}.png")
                    self._images.add(f.name)
            if f.proof is not None:
                side_by_side = np.concatenate(list(f.proof.generations), axis=1)
                self._save(Image.fromarray(side_by_side), event, "generations", f.name, file)

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
        self.retention.rewind(step, map(Event.from_dict, [*rows, *self._held]))

    def close(self) -> None:
        """Write the lines that have waited, one by one, so that what is written is held no longer."""
        while self._held:
            append(self.folder / HISTORY, self._held[:1])
            del self._held[0]


class LossSink:
    """Writes ``losses.jsonl``: ``step``, ``key`` and ``value`` of one validation loss per line.

    Nothing is written before the first report: until then the folder may hold the files of another run. A checkpoint
    keeps ``count``, how many losses the run has noted so far.
    """

    name = "losses"

    def __init__(self, folder: Path) -> None:
        self.file, self.count, self._is_ours = folder / LOSSES, 0, False
        self._unwritten: list[dict[str, Any]] = []

    def note(self, values: Mapping[str, Any], step: int) -> None:
        """Keep the validation losses among what the loop logs: finite numbers, and tensors that hold one.

        Raises:
            OSError: the disk refused; they are written with those that follow.
        """
        for key, value in values.items():
            with suppress(TypeError, ValueError, RuntimeError):  # no number
                if is_validation_loss(key) and math.isfinite(number := float(value)):
                    self._unwritten.append({"step": int(step), "key": key, "value": number})
                    self.count += 1
        self.close()

    def write(self, report: Report) -> None:
        """The folder is this run's from now on."""
        self._is_ours = True
        self.close()

    def rewind(self, count: int) -> None:
        """Forget all losses but the first ``count`` of the run: training goes on from an earlier checkpoint."""
        rows = read_lines(self.file)
        if len(rows) > count:
            rewrite(self.file, rows[:count])
        self._is_ours, self._unwritten, self.count = True, [], min(count, len(rows))

    def close(self) -> None:
        """Write what has waited."""
        if self._is_ours and self._unwritten:
            append(self.file, self._unwritten)
            self._unwritten = []


def is_validation_loss(key: str) -> bool:
    """Whether a logged key names a loss on data that is not trained on."""
    words = set(re.split(r"[^a-z]+", key.lower()))
    return "loss" in words and bool(words & HELD_OUT) and not words & OTHERWISE
