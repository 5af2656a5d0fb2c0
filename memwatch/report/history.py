"""History: a run's folder read back. Tables, the terminal and the report page are made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.jsonl import read_lines

HISTORY, ABOUT, LOSSES = "history.jsonl", "about.json", "losses.jsonl"


@dataclass(frozen=True)
class Row:
    """One probe at one event, as ``history.jsonl`` holds it.

    Attributes:
        name, prompt, is_reference: the probe.
        verdict, severity, severity_low, p: as in ``Evidence``; ``reason`` says why in words.
        since: step from which on there is evidence. alert: whether this event was news.
        alert_text: the alert in words; ``None`` where it was no news.
        baseline: what it was compared with, in words.
        timesteps: noise levels. levels: the factor of each, see ``report.level_factors``; empty where nothing was
            compared.
        regions: fields of ``Region``, the one that decides first.
        copied: the proof: ``generations`` and ``copies`` (numbers), ``ratios``, ``is_copy``, ``of_others``; ``None``
            where nothing was generated.
    """

    name: str
    prompt: str = ""
    is_reference: bool = True
    verdict: Verdict = Verdict.INCONCLUSIVE
    severity: float = 1.0
    severity_low: float = 1.0
    p: float | None = None
    reason: str = ""
    since: int | None = None
    alert: bool = False
    alert_text: str | None = None
    baseline: str = ""
    timesteps: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    regions: tuple[dict[str, Any], ...] = ()
    copied: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """A finding of a line; what an older version did not write keeps its default."""
        known: dict[str, Any] = {f.name: saved[f.name] for f in fields(cls) if saved.get(f.name) is not None}
        known |= {key: tuple(known[key]) for key in ("timesteps", "levels", "regions") if key in known}
        return cls(**known | {"verdict": Verdict(saved.get("verdict", Verdict.INCONCLUSIVE))})

    @property
    def area(self) -> float:
        """Share of the picture inside regions."""
        return float(sum(region["area"] for region in self.regions))


@dataclass(frozen=True)
class Event:
    """One line of ``history.jsonl``; the attributes are those of ``Report.to_dict``.

    Attributes:
        rows: one per probe, in their order.
        controls: severity of every control.
    """

    step: int
    rows: tuple[Row, ...] = ()
    controls: Mapping[str, float] | None = None
    audit: str = ""
    calibrated: bool = False
    scalars: Mapping[str, float] | None = None
    seconds: float = 0.0
    overhead: float | None = None
    errors: int = 0
    stop_reason: str | None = None
    failure: str | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """A line; what an older version did not write keeps its default."""
        known: dict[str, Any] = {f.name: saved[f.name] for f in fields(cls) if saved.get(f.name) is not None}
        return cls(**known | {"rows": tuple(map(Row.from_dict, saved.get("findings", ())))})

    @property
    def has_news(self) -> bool:
        """Whether any probe's verdict got worse, or a generation copied one."""
        return any(row.alert or (row.copied or {}).get("copies") for row in self.rows)

    def count(self, verdict: Verdict) -> int:
        return sum(row.verdict is verdict for row in self.rows)

    @property
    def worst_first(self) -> list[Row]:
        """The rows: memorized first, then suspicious, then the others, each by severity."""
        order = list(Verdict)
        return sorted(self.rows, key=lambda row: (order.index(row.verdict), -row.severity))

    def counts(self) -> str:
        """How many probes have each verdict, in words."""
        return ", ".join(f"{n} {verdict}" for verdict in Verdict if (n := self.count(verdict))) or "no probe was judged"


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        events: oldest first. losses: the validation losses that the loop logged: ``(step, key, value)``.
    """

    folder: Path
    about: About
    events: tuple[Event, ...]
    losses: tuple[tuple[int, str, float], ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """What a run has written so far; a line that it has not finished is passed over.

        Raises:
            FileNotFoundError: there is no history. ValueError: it holds no event.
        """
        if not (folder / HISTORY).is_file():
            inside = [str(file.parent) for file in sorted(folder.glob(f"*/{HISTORY}"))]
            allowed = " or ".join(inside) or "the output_dir of a run or of a scan, after its first event"
            raise FileNotFoundError(f"{folder} holds no {HISTORY}; allowed: {allowed}")
        lines = read_lines(folder / HISTORY)
        has_controls = any(line.get("controls") for line in lines)  # an older version did not say
        events = tuple(Event.from_dict({"calibrated": has_controls} | line) for line in lines)
        if not events:
            raise ValueError(f"{folder / HISTORY} holds no event yet")
        about = About()
        if (folder / ABOUT).is_file():
            about = About.from_dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        losses = tuple((row["step"], row["key"], row["value"]) for row in read_lines(folder / LOSSES))
        return cls(folder, about, events, losses)

    @property
    def last(self) -> Event:
        """The last event; the last one with findings where there is one."""
        return next((event for event in reversed(self.events) if event.rows), self.events[-1])

    @property
    def stop(self) -> Event | None:
        """The event that decided to stop the training."""
        return next((event for event in self.events if event.stop_reason is not None), None)

    @cached_property
    def alerts(self) -> tuple[tuple[int, Row], ...]:
        """Every alert with its step."""
        return tuple((event.step, row) for event in self.events for row in event.rows if row.alert)

    @property
    def memorized(self) -> list[str]:
        """Names of the probes that any event called memorized."""
        found = (row.name for event in self.events for row in event.rows if row.verdict is Verdict.MEMORIZED)
        return list(dict.fromkeys(found))

    def until(self, step: int) -> Run:
        """The same run as it was after this step."""
        losses = tuple(loss for loss in self.losses if loss[0] <= step)
        return replace(self, events=tuple(e for e in self.events if e.step <= step), losses=losses)
