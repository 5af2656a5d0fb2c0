"""A run's folder read back: the table of an event, the dashboards, the report page and every command rest on it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.run_folder import write_whole

HISTORY, ABOUT, LOSSES = "history.jsonl", "about.json", "losses.jsonl"


@dataclass(frozen=True)
class Row:
    """One probe at one event, as ``history.jsonl`` holds it; ``verdict``, ``severity`` and ``p`` as in ``Evidence``.

    Attributes:
        reason, baseline: why the verdict is what it is, and what the probe was compared with, in words.
        since: step from which on there is evidence.
        alert, alert_text: whether this event was news, and the news in words.
        timesteps: noise levels.
        regions: fields of ``Region``, the strongest first.
        copied: ``generations``, ``copies`` (how many copy it), their ``grade`` (see ``Proof``), ``ratios`` and
            ``is_copy`` of each, ``of_others`` (how many copy another probe, by its name); ``None`` where nothing was
            generated.
    """

    name: str
    title: str = ""
    prompt: str = ""
    is_reference: bool = True
    verdict: Verdict = Verdict.INCONCLUSIVE
    severity: float = 1.0
    p: float | None = None
    reason: str = ""
    since: int | None = None
    alert: bool = False
    alert_text: str | None = None
    baseline: str = ""
    timesteps: Sequence[float] = ()
    regions: Sequence[dict[str, Any]] = ()
    copied: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """A finding of a line."""
        return cls(**_known(cls, saved) | {"verdict": Verdict(saved["verdict"])})

    @property
    def effect(self) -> str:
        """The effect and its p-value in words; empty where no judgement was possible."""
        if self.verdict is Verdict.INCONCLUSIVE:
            return ""
        effect = f"{self.severity:.1f}x reduction" if self.severity >= 1.05 else "no reduction"
        return effect if self.p is None else f"{effect}, p = {self.p:.1g}"

    @property
    def why(self) -> str:
        """What the verdict rests on: effect, p-value and reason."""
        return ": ".join(filter(None, [self.effect, self.reason]))

    @property
    def caption(self) -> str:
        """What a dashboard says below the probe's picture."""
        return f"{self.title}, {self.verdict}. {self.why}"

    def proof(self, *, brief: bool = False) -> str:
        """How many generations copy the probe, their grade and, unless ``brief``, other probes; empty where none is."""
        if self.copied is None:
            return ""
        count, copies = self.copied["generations"], self.copied["copies"]
        if not any(ratio is not None and math.isfinite(ratio) for ratio in self.copied["ratios"]):
            return "copies cannot be told" if brief else f"{count} generations: copies cannot be told"
        verb = ("copies" if self.is_reference else "shows") if copies == 1 else "copy" if self.is_reference else "show"
        text = f"{copies} of {count} {'' if brief else 'generations '}{verb} it"
        if (grade := self.copied.get("grade")) is not None:
            text += f", graded {grade:.2f}" + ("" if brief else ": 0 is chance, 1 is identical")
        others = ", ".join(f"{name} ({count})" for name, count in self.copied["of_others"].items())
        return text if brief or not others else f"{text}; copies of other images: {others}"


@dataclass(frozen=True)
class Event:
    """One line of ``history.jsonl``, see ``Report``: a row per probe in their order, the severity of every control."""

    step: int
    rows: tuple[Row, ...] = ()
    controls: Mapping[str, float] = field(default_factory=dict)
    standing: str = ""
    calibrated: bool = False
    scalars: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    overhead: float | None = None
    errors: int = 0
    stop_reason: str | None = None
    failure: str | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """A line."""
        return cls(**_known(cls, {**saved, "rows": tuple(map(Row.from_dict, saved["findings"]))}))

    @property
    def has_news(self) -> bool:
        """Whether any probe's verdict got worse, or a generation copied one."""
        return any(row.alert or (row.copied or {}).get("copies") for row in self.rows)

    @property
    def calibration(self) -> str:
        """What the controls say."""
        if not self.calibrated:
            return "there are no controls, so alerts are uncalibrated"
        return self.standing or "no control has been scored"

    def count(self, verdict: Verdict) -> int:
        return sum(row.verdict is verdict for row in self.rows)

    def counts(self) -> str:
        """How many probes have each verdict, in words."""
        return ", ".join(f"{n} {verdict}" for verdict in Verdict if (n := self.count(verdict))) or "no probe was judged"

    @property
    def worst_first(self) -> list[Row]:
        """The rows: memorized first, then suspicious, then the others, each by severity."""
        order = list(Verdict)
        return sorted(self.rows, key=lambda row: (order.index(row.verdict), -row.severity))

    def left_out(self, shown: int, named: int = 1000) -> str:
        """The probes beyond the ``shown`` worst by verdict; more than ``named`` without evidence are not named.

        Those that could not be judged are named with the reason.
        """
        titles: dict[tuple[Verdict, str], list[str]] = {}
        for row in self.worst_first[shown:]:
            why = f" ({row.reason})" if row.verdict is Verdict.INCONCLUSIVE else ""
            titles.setdefault((row.verdict, why), []).append(row.title)
        found = []
        for (verdict, why), names in titles.items():
            which = f": {', '.join(names)}" if verdict.is_evidence or len(names) <= named else ""
            how = "without evidence" if verdict is Verdict.NO_EVIDENCE else verdict
            found.append(f"{len(names)} more {how}{why}{which}")
        return "; ".join(found)


def _known(cls: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a class; what was not finite is null in the file and keeps its default."""
    return {f.name: saved[f.name] for f in fields(cls) if saved[f.name] is not None}


@dataclass(frozen=True)
class Run:
    """A run's folder: its events, oldest first, and the validation losses that the loop logged: step, key, value."""

    folder: Path
    about: About
    events: tuple[Event, ...]
    losses: tuple[tuple[int, str, float], ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """What a run has written so far; a line that it has not finished is passed over.

        Raises:
            FileNotFoundError: there is no history. ValueError: it holds no event, or another version has written it.
        """
        if not (folder / HISTORY).is_file():
            inside = [str(file.parent) for file in sorted(folder.glob(f"*/{HISTORY}"))]
            allowed = " or ".join(inside) or "the output_dir of a run or of a scan, after its first event"
            raise FileNotFoundError(f"{folder} holds no {HISTORY}; allowed: {allowed}")
        try:
            events = tuple(map(Event.from_dict, read_lines(folder / HISTORY)))
            losses = tuple((row["step"], row["key"], row["value"]) for row in read_lines(folder / LOSSES))
            about = About.read(folder / ABOUT)
        except (KeyError, TypeError) as error:
            what = f"{folder} was written by another version of memwatch and cannot be read by this one ({error!r})"
            raise ValueError(what) from error
        if not events:
            raise ValueError(f"{folder / HISTORY} holds no event yet")
        return cls(folder, about, events, losses)

    @property
    def last(self) -> Event:
        """The last event with findings; without any, the last event."""
        return next((event for event in reversed(self.events) if event.rows), self.events[-1])

    @property
    def stop(self) -> Event | None:
        """The event that decided to stop the training."""
        return next((event for event in self.events if event.stop_reason is not None), None)

    @property
    def rows(self) -> list[tuple[int, Row]]:
        """Every row of every event, with its step."""
        return [(event.step, row) for event in self.events for row in event.rows]

    @property
    def memorized(self) -> dict[str, int]:
        """The probes that any event called memorized, by name, and since when."""
        found: dict[str, int] = {}
        for step, row in self.rows:
            if row.verdict is Verdict.MEMORIZED:
                found.setdefault(row.name, step if row.since is None else row.since)
        return found


# --- files of one JSON object per line, written while others read them ------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects that have a ``step``; ``[]`` without the file. A line that is not whole is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                found.append(row)
    return found


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add objects; where a full disk has cut the last line off, that line is ended first.

    Raises:
        OSError: the disk refused. ValueError: a number is not finite.
    """
    text = _to_text(rows)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put these objects in the place of all others; whole or not at all."""
    write_whole(path, _to_text(rows))


def _to_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
