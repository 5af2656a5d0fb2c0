"""Flagged: the rows of the training set that lie behind findings, in ``flagged.jsonl``, which ``memwatch clean`` reads.

A probe is flagged from its first suspicion on, and by the worst that it was ever called: what was memorized once stays
so, even if it fades later. Of the events with that verdict the newest is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memwatch.act.source_rows import file_name, rows_behind
from memwatch.judge.verdict import Verdict
from memwatch.picking.picked import Picked
from memwatch.report.jsonl import read_lines, rewrite
from memwatch.report.report import Report

FLAGGED = "flagged.jsonl"


@dataclass(frozen=True)
class Flagged:
    """A probe with evidence, and the training rows behind it.

    Attributes:
        probe: its name.
        verdict: ``memorized`` or ``suspicious``.
        step: optimizer step of the newest event with that verdict.
        row: of the training set; ``None`` where the probe was not picked from it.
        rows: all rows behind it, rising: its own, its near-duplicates, and those that share the part which the region
            lies on. Empty without ``row``.
        files: their names, in the same order: relative to the image folder, else the file's path, else ``row-00012``.
        why: what those rows are, in words.
        exposures: how often training has shown one of them so far, if every row is shown equally often; ``None`` where
            that is not known.
        box: of the region that decides, ``(left, top, right, bottom)`` in pixels of the probe's image; ``None`` where
            there is none.
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
    def from_dict(cls, saved: Mapping[str, Any]) -> Flagged:
        """From a line of ``flagged.jsonl``; other keys are ignored.

        Raises:
            ValueError: it is no such line; the message names the key that is missing.
        """
        try:
            values: dict[str, Any] = {field.name: saved[field.name] for field in fields(cls)}
        except KeyError as error:
            raise ValueError(f"no line of {FLAGGED}: it has no {error}") from error
        values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**values)


class FlaggedSink:
    """Keeps ``flagged.jsonl`` up to date: one line per flagged probe, the worst first; see ``Flagged``.

    The file is written whole at every event that adds to it. Its ``looks`` hold what every event with evidence said of
    the probe, so that a run that resumes from an earlier checkpoint forgets exactly what came after it.

    Args:
        folder: ``output_dir``; nothing is created before something is flagged.
        picked: what the probes were picked from.
        rows_seen: rows that training has seen so far; ``None`` where that is not known.
    """

    name = "flagged rows"

    def __init__(
        self, folder: Path, picked: Picked | None = None, rows_seen: Callable[[], int | None] = lambda: None
    ) -> None:
        self.file, self._picked, self._rows_seen = folder / FLAGGED, picked, rows_seen
        self._looks: dict[str, list[dict[str, Any]]] = {}  # by probe, as in the file

    @property
    def flagged(self) -> list[Flagged]:
        """Every flagged probe, the worst first."""
        found = [self._flagged(probe, looks) for probe, looks in self._looks.items()]
        return sorted(found, key=lambda f: (not f.is_memorized, -f.severity, f.probe))

    def _flagged(self, probe: str, looks: list[dict[str, Any]]) -> Flagged:
        look = ([look for look in looks if look["verdict"] == Verdict.MEMORIZED] or looks)[-1]
        box, picked = look["box"], self._picked
        region = None if box is None or not look["side"] else tuple(edge / look["side"] for edge in box)
        rows, why = rows_behind(picked, look["row"], region)
        exposures = None
        if picked is not None and look["seen"] is not None and rows:
            exposures = look["seen"] * len(rows) / max(1, len(picked.train_rows))
        return Flagged(
            probe=probe,
            verdict=look["verdict"],
            step=look["step"],
            row=look["row"] if rows else None,
            rows=rows,
            files=() if picked is None else tuple(file_name(picked.rows, row) for row in rows),
            why=why,
            exposures=exposures,
            box=None if box is None else tuple(box),
            severity=look["severity"],
        )

    def write(self, report: Report) -> None:
        """Note what has evidence at this event."""
        evident = [finding for finding in report.findings if finding.verdict.is_evidence]
        seen = self._rows_seen() if evident else None
        for finding in evident:
            image = finding.observation.image
            look = {"step": report.step, "verdict": str(finding.verdict), "severity": finding.severity}
            look |= {"row": finding.observation.probe.row, "box": finding.regions[0].box if finding.regions else None}
            look |= {"side": 0 if image is None else image.shape[0], "seen": seen}
            self._looks.setdefault(finding.name, []).append(look)
        if evident:
            self._write()

    def rewind(self, step: int) -> None:
        """Go on from what the file held after the event at ``step``: training resumes from an earlier checkpoint."""
        self._looks |= {str(line.get("probe")): list(line.get("looks", ())) for line in read_lines(self.file)}
        kept = {probe: [look for look in looks if look["step"] <= step] for probe, looks in self._looks.items()}
        self._looks = {probe: looks for probe, looks in kept.items() if looks}
        if self.file.is_file():
            self._write()

    def forget(self) -> None:
        """A new run begins in this process; the file is the earlier one's."""
        self._looks = {}

    def close(self) -> None:
        """The file is closed after every write."""

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rewrite(self.file, [asdict(f) | {"looks": self._looks[f.probe]} for f in self.flagged])


def read_flagged(file: Path) -> list[Flagged]:
    """The lines of a ``flagged.jsonl``.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a run writes {FLAGGED} into its output_dir")
    return [Flagged.from_dict(line) for line in read_lines(file)]
