"""Flagged: which rows of the training set lie behind what was found, in ``flagged.jsonl``.

``memwatch clean`` reads it. A probe is flagged from its first suspicion on, and by the worst that it was ever called:
what was memorized once stays so, even if it fades later. Of the events with that verdict the newest is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memwatch.act.source_rows import file_name, rows_behind
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.picking.picked import Picked
from memwatch.picking.survey import Box
from memwatch.report.jsonl import read_lines, rewrite
from memwatch.report.report import Report

FLAGGED = "flagged.jsonl"
LOOKS = "looks"

RowsSeen = Callable[[], int | None]


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Flagged:
        """The inverse; other keys are passed over.

        Raises:
            ValueError: it is no line of ``flagged.jsonl``; the message names the key.
        """
        try:
            values = {name: saved[name] for name in cls.__dataclass_fields__}
            lists: dict[str, Any] = {name: tuple(values[name]) for name in ("rows", "files")}
            lists["box"] = None if values["box"] is None else tuple(values["box"])
            return cls(**values | lists)
        except KeyError as error:
            raise ValueError(f"no line of {FLAGGED}: it has no {error}") from error
        except TypeError as error:
            raise ValueError(f"no line of {FLAGGED}: {error}") from error


@dataclass(frozen=True)
class Look:
    """What one event said of a probe with evidence.

    Attributes:
        row: as in ``Flagged``, and so are verdict, step, severity and box.
        side: of the probe's image, pixels.
        seen: rows that training had seen by then, if known.
    """

    step: int
    verdict: str
    severity: float
    row: int | None
    box: tuple[int, int, int, int] | None
    side: int
    seen: int | None

    @classmethod
    def of(cls, finding: Finding, step: int, seen: int | None) -> Look:
        image, region = finding.observation.image, finding.regions[0] if finding.regions else None
        box, side = None if region is None else region.box, 0 if image is None else image.shape[0]
        return cls(step, str(finding.verdict), finding.severity, finding.observation.probe.row, box, side, seen)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Look:
        return cls(**dict(saved) | {"box": None if saved["box"] is None else tuple(saved["box"])})

    @property
    def region(self) -> Box | None:
        """The box in fractions of the picture."""
        if self.box is None or self.side <= 0:
            return None
        left, top, right, bottom = (edge / self.side for edge in self.box)
        return left, top, right, bottom


def flagged_of(looks: Mapping[str, Sequence[Look]], picked: Picked | None) -> list[Flagged]:
    """Every probe with evidence, the worst first.

    Args:
        looks: by probe, its events with evidence in order of their steps.
        picked: what the probes were picked from; ``None`` where they came otherwise.
    """
    found = [_flagged(name, told(of_probe), picked) for name, of_probe in looks.items() if of_probe]
    return sorted(found, key=lambda f: (not f.is_memorized, -f.severity, f.probe))


def told(looks: Sequence[Look]) -> Look:
    """Which event stands for a probe: the newest with the worst verdict."""
    memorized = [look for look in looks if look.verdict == Verdict.MEMORIZED]
    return (memorized or looks)[-1]


def _flagged(name: str, look: Look, picked: Picked | None) -> Flagged:
    rows, why = rows_behind(picked, look.row, look.region)
    exposures = None
    if picked is not None and look.seen is not None and rows:
        exposures = look.seen * len(rows) / max(1, len(picked.train_rows))
    files = tuple(file_name(picked.rows, row) for row in rows) if picked is not None else ()
    row = look.row if rows else None
    return Flagged(name, look.verdict, look.step, row, rows, files, why, exposures, look.box, look.severity)


class FlaggedSink:
    """Keeps ``flagged.jsonl`` up to date: one line per flagged probe, the worst first; see ``Flagged``.

    The file is written whole at every event that adds to it. Its ``looks`` hold every event with evidence, so that a
    run that resumes from an earlier checkpoint forgets exactly what came after it.

    Args:
        folder: ``output_dir``; nothing is created before something is flagged.
        picked: what the probes were picked from.
        rows_seen: rows that training has seen so far; ``None`` where that is not known.
    """

    name = "flagged rows"

    def __init__(self, folder: Path, picked: Picked | None = None, rows_seen: RowsSeen = lambda: None) -> None:
        self.file, self._picked, self._rows_seen = folder / FLAGGED, picked, rows_seen
        self._looks: dict[str, list[Look]] = {}

    @property
    def flagged(self) -> list[Flagged]:
        """Every flagged probe, the worst first."""
        return flagged_of(self._looks, self._picked)

    def write(self, report: Report) -> None:
        """Note what has evidence at this event."""
        evident = [finding for finding in report.findings if finding.verdict.is_evidence]
        seen = self._rows_seen() if evident else None
        for finding in evident:
            self._looks.setdefault(finding.name, []).append(Look.of(finding, report.step, seen))
        if evident:
            self._write()

    def rewind(self, step: int) -> None:
        """Go on from what the file held after the event at ``step``: training resumes from an earlier checkpoint."""
        for line in read_lines(self.file):
            self._looks[str(line.get("probe"))] = [Look.from_dict(look) for look in line.get(LOOKS, ())]
        kept = {name: [look for look in looks if look.step <= step] for name, looks in self._looks.items()}
        self._looks = {name: looks for name, looks in kept.items() if looks}
        if self.file.is_file():
            self._write()

    def forget(self) -> None:
        """A new run begins in this process; the file is the earlier one's."""
        self._looks = {}

    def close(self) -> None:
        """The file is closed after every write."""

    def _write(self) -> None:
        lines = [f.to_dict() | {LOOKS: [asdict(look) for look in self._looks[f.probe]]} for f in self.flagged]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rewrite(self.file, lines)


def read_flagged(file: Path) -> list[Flagged]:
    """The lines of a ``flagged.jsonl``.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; a run writes {FLAGGED} into its output_dir")
    return [Flagged.from_dict(line) for line in read_lines(file)]
