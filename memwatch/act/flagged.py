"""Flagged: the rows of the training set that lie behind findings, in ``flagged.jsonl``, which ``memwatch clean`` reads.

A probe is flagged from its first suspicion on, with the worst verdict that it ever got: what was memorized once stays
so, even if it fades later. The newest event with that verdict is the one in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.measure.metadata_files import json_lines
from memwatch.messages import counted
from memwatch.picking.picked import Picked
from memwatch.picking.same_place import Box, shared_area
from memwatch.picking.survey import GroupKind
from memwatch.report.history import rewrite
from memwatch.report.report import Report

FLAGGED = "flagged.jsonl"
SAME_PLACE = 0.5  # least overlap of part and region, as a share of the smaller one


@dataclass(frozen=True)
class Flagged:
    """A probe with evidence, and the training rows behind it.

    Attributes:
        probe: its name.
        verdict: ``memorized`` or ``suspicious``.
        step: optimizer step of the newest event with that verdict.
        row: of the training set; ``None`` where the probe was not picked from it.
        rows: all rows behind it, rising, see ``rows_behind``.
        files: their names, in the same order: relative to the image folder, else the file's path, else ``row-00012``.
        why: what those rows are, in words.
        exposures: how often training has shown one of them so far, if every row is shown equally often; ``None`` where
            that is not known.
        box: of the strongest region, ``(left, top, right, bottom)`` in pixels of the probe's image, or ``None``.
        severity: reduction factor, 1 is none.
    """

    probe: str
    verdict: str
    step: int
    row: int | None
    rows: tuple[int, ...]
    files: tuple[str, ...]
    why: str
    exposures: float | None
    box: tuple[int, int, int, int] | None
    severity: float

    @property
    def is_memorized(self) -> bool:
        return self.verdict == Verdict.MEMORIZED

    @classmethod
    def of(cls, step: int, finding: Finding, picked: Picked | None, rows_seen: int | None) -> Flagged:
        """What a finding with evidence flags, after ``rows_seen`` rows of training."""
        image, row = finding.observation.image, finding.observation.probe.row
        box = finding.regions[0].box if finding.regions else None
        region = None if box is None or image is None else tuple(edge / image.shape[0] for edge in box)
        rows, why = rows_behind(picked, row, region)
        files: list[str] = []
        exposures = None
        if picked is not None:
            of_folder = picked.rows.folder is not None
            files = [
                picked.rows.name(r) if of_folder else str(picked.rows.file(r) or picked.rows.name(r)) for r in rows
            ]
            if rows and rows_seen is not None:
                exposures = rows_seen * len(rows) / max(1, len(picked.train_rows))
        told = finding.name, str(finding.verdict), step, row if rows else None
        return cls(*told, rows, tuple(files), why, exposures, box, finding.severity)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Flagged:
        """From a line of ``flagged.jsonl``, or a ``ValueError`` that names the key that is missing."""
        try:
            values: dict[str, Any] = {field.name: saved[field.name] for field in fields(cls)}
        except KeyError as error:
            raise ValueError(f"no line of {FLAGGED}: it has no {error}") from error
        values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**values)


class FlaggedSink:
    """Keeps ``flagged.jsonl`` in ``folder`` up to date: one line per flagged probe, the worst first.

    ``picked`` is what the probes were picked from; ``rows_seen`` gives how many rows training has seen so far.
    """

    name = "flagged rows"

    def __init__(
        self, folder: Path, picked: Picked | None = None, rows_seen: Callable[[], int | None] = lambda: None
    ) -> None:
        self.file, self._picked, self._rows_seen = folder / FLAGGED, picked, rows_seen
        self._by_probe: dict[str, Flagged] = {}

    @property
    def flagged(self) -> list[Flagged]:
        return sorted(self._by_probe.values(), key=lambda f: (not f.is_memorized, -f.severity, f.probe))

    def write(self, report: Report) -> None:
        """Note what has evidence at this event."""
        evident = [finding for finding in report.findings if finding.verdict.is_evidence]
        for finding in evident:
            new = Flagged.of(report.step, finding, self._picked, self._rows_seen())
            before = self._by_probe.get(new.probe)
            if new.is_memorized or before is None or not before.is_memorized:
                self._by_probe[new.probe] = new
        if evident:
            self._write()

    def close(self) -> None:
        """The file is closed after every write."""

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for a checkpoint."""
        return [asdict(f) for f in self.flagged]

    def restore(self, saved: Iterable[Mapping[str, Any]] | None) -> None:
        """Go on from what ``to_list`` gave; the file loses what was flagged later. ``None``: it is an earlier run's."""
        self._by_probe = {str(line["probe"]): Flagged.from_dict(line) for line in saved or ()}
        if saved is not None and self.file.is_file():
            self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rewrite(self.file, self.to_list())


def read_flagged(file: Path) -> list[Flagged]:
    """The lines of a ``flagged.jsonl``; a ``FileNotFoundError`` without it, a ``ValueError`` where it is none."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a run writes {FLAGGED} into its output_dir")
    found = []
    for where, line in json_lines(file):
        try:
            found.append(Flagged.from_dict(line))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return found


def rows_behind(picked: Picked | None, row: int | None, region: Box | None) -> tuple[tuple[int, ...], str]:
    """The training rows behind a finding, rising, and what they are in words.

    These are the row itself, all its near-duplicates, and the rows of a shared part that the finding is about: at least
    half of the region lies in the part, or half of the part in the region.

    Args:
        row: of the probe. region: the box of its strongest region, in fractions of the picture.
    """
    if picked is None or row is None or not 0 <= row < picked.survey.size:
        return (), "not picked from the training set"
    rows, words = {row}, []
    for group in picked.groups_with(row):
        boxes = [box for member, box in zip(group.rows, group.boxes, strict=True) if member == row]
        if group.kind is GroupKind.DUPLICATES:
            words.append(counted(len(group.rows), "near-duplicate"))
        elif region is not None and any(shared_area(region, box) >= SAME_PLACE for box in boxes):
            words.append(f"{counted(len(group.rows), 'row')} that share the part")
        else:
            continue
        rows |= set(group.rows)
    return tuple(sorted(rows)), ", ".join(words) or "this row alone"
