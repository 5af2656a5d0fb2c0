"""Terminal: an event as a small table."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any
from unicodedata import combining, east_asian_width

from tqdm.auto import tqdm

from memwatch.judge.verdict import Verdict
from memwatch.report.about import About
from memwatch.report.copied import proof_words
from memwatch.report.history import Event, Row
from memwatch.report.report import Report

SHOWN = 3  # probes per event, worst first
ANSI = {
    Verdict.MEMORIZED: "\x1b[1;31m",
    Verdict.SUSPICIOUS: "\x1b[33m",
    Verdict.NO_EVIDENCE: "\x1b[32m",
    Verdict.INCONCLUSIVE: "\x1b[2m",
}
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
HEAD = ("probe", "verdict", "effect", "p", "region, px", "generations")
VERDICT = 1  # index of that column


class Console:
    """Prints every event above the progress bars."""

    name = "console"

    def write(self, report: Report) -> None:
        tqdm.write(summary(report.to_event(), report.about, colour=can_colour(sys.stdout)))

    def close(self) -> None: ...


def can_colour(stream: Any) -> bool:
    """Whether a stream is a terminal that knows colours, and whose user wants them (https://no-color.org)."""
    is_terminal = bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
    return is_terminal and not os.environ.get("NO_COLOR")


def summary(event: Event, about: About, *, colour: bool = False, shown: int = SHOWN) -> str:
    """Verdict counts, the worst probes, the controls, the cost, and the reason of a stop.

    Args:
        colour: ANSI colours.
        shown: how many probes, at least 0.
    """
    planned = about.settings.get("max_train_steps")
    head = f"memwatch, step {event.step}{f' of {planned}' if planned else ''}"
    if event.failure is not None:
        lines = [f"{head}: this event is lost, since {event.failure}"]
    else:
        why = unjudged(event.rows)
        lines = [f"{head}: {event.counts()}", *([f"  {why}"] if why else table(event.worst_first[:shown], colour))]
        lines += [f"  and {left} more"] if (left := len(event.rows) - shown) > 0 and not why else []
        lines.append(f"  {event.audit if event.calibrated else 'uncalibrated: there are no controls'}")
    lines.append(f"  {cost(event)}")
    if colour:
        lines[0] = f"{BOLD}{lines[0]}{PLAIN}"
    if event.stop_reason is not None:
        stop = f"STOP: {event.stop_reason}"
        lines.append(f"  {ANSI[Verdict.MEMORIZED]}{stop}{PLAIN}" if colour else f"  {stop}")
    return "\n".join(lines)


def cost(event: Event) -> str:
    """Seconds, share of training time, and what has failed so far."""
    parts = [f"{event.seconds:.1f} s"]
    if event.overhead is not None:
        parts.append(f"{100 * event.overhead:.1f} % of training time")
    if event.errors:
        parts.append(f"{event.errors} failure{'s' if event.errors > 1 else ''} of memwatch so far")
    return ", ".join(parts)


def unjudged(rows: Sequence[Row]) -> str | None:
    """Why no probe could be judged, where one reason fits all, as at the first event; ``None`` otherwise."""
    reasons = {row.reason for row in rows}
    alike = len(reasons) == 1 and all(row.verdict is Verdict.INCONCLUSIVE for row in rows)
    return reasons.pop() if alike and len(rows) > 1 else None


def table(rows: list[Row], colour: bool) -> list[str]:
    """Aligned lines under a header; none without rows. A column that holds nothing is left out."""
    if not rows:
        return []
    cells = [HEAD, *map(cells_of, rows)]
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in cells[1:])]
    widths = {i: max(columns(line[i]) for line in cells) for i in kept}
    lines = []
    for line, row in zip(cells, [None, *rows], strict=True):
        padded = {i: line[i] + " " * (widths[i] - columns(line[i])) for i in kept}
        if colour and row is not None:
            padded[VERDICT] = f"{ANSI[row.verdict]}{padded[VERDICT]}{PLAIN}"
        lines.append(f"  {'  '.join(padded.values())}".rstrip())
    return lines


def columns(text: str) -> int:
    """How wide a terminal shows a text; East Asian characters take two columns.

    >>> columns("cat"), columns("猫")
    (3, 2)
    """
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cells_of(row: Row) -> tuple[str, ...]:
    """A probe under ``HEAD``."""
    name = row.name if len(row.name) <= 40 else f"{row.name[:24]}...{row.name[-13:]}"
    p = "" if row.p is None else f"{row.p:.2g}"
    where = "{},{} to {},{}".format(*row.regions[0]["box"]) if row.regions else ""
    return name, str(row.verdict), f"{row.severity:.1f}x", p, where, proof_words(row, brief=True) or ""
