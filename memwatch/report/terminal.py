"""Terminal: an event as a small table."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm

from memwatch.judge.alerts import Verdict
from memwatch.report.about import About
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


class Console:
    """Prints every event above the progress bars."""

    name = "console"

    def write(self, report: Report) -> None:
        tqdm.write(summary(report.to_event(), report.about, colour=can_colour(sys.stdout)))

    def close(self) -> None: ...


def can_colour(stream: Any) -> bool:
    """Whether a stream is a terminal whose user wants colours (https://no-color.org)."""
    return bool(getattr(stream, "isatty", lambda: False)()) and "NO_COLOR" not in os.environ


def summary(event: Event, about: About, *, colour: bool = False, shown: int = SHOWN) -> str:
    """Verdict counts, the worst probes, the controls, the cost, and the reason of a stop.

    Args:
        colour: ANSI colours.
        shown: how many probes.
    """
    planned = about.settings.get("max_train_steps")
    head = f"memwatch, step {event.step}{f' of {planned}' if planned else ''}"
    cost = f"{event.seconds:.1f} s"
    if event.overhead is not None:
        cost += f", {100 * event.overhead:.1f} % of training time"
    if event.errors:
        cost += f", {event.errors} failures of memwatch"
    if event.failure is not None:
        lines = [f"{head}: this event is lost, since {event.failure}"]
    else:
        calibrated = event.audit if event.calibrated else "uncalibrated: there are no controls"
        lines = [f"{head}: {event.counts()}", *table(event.worst_first[:shown], colour), f"  {calibrated}"]
        if (left := len(event.rows) - shown) > 0:
            lines.insert(-1, f"  and {left} more")
    lines.append(f"  {cost}")
    if event.stop_reason is not None:
        lines.append(f"  STOP: {event.stop_reason}")
    if colour:
        lines[0] = f"{BOLD}{lines[0]}{PLAIN}"
    return "\n".join(lines)


def table(rows: list[Row], colour: bool) -> list[str]:
    """Aligned lines under a header; none without rows. A column that holds nothing is left out."""
    if not rows:
        return []
    cells = [HEAD, *(cells_of(row) for row in rows)]
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in cells[1:])]
    width = {i: max(len(line[i]) for line in cells) for i in kept}
    lines = ["  " + "  ".join(line[i].ljust(width[i]) for i in kept).rstrip() for line in cells]
    if colour:
        for n, row in enumerate(rows, start=1):
            lines[n] = lines[n].replace(f"  {row.verdict} ", f"  {ANSI[row.verdict]}{row.verdict}{PLAIN} ", 1)
    return lines


def cells_of(row: Row) -> tuple[str, ...]:
    """A probe under ``HEAD``."""
    p = "" if row.p is None else f"{row.p:.2g}"
    where = "{},{} to {},{}".format(*row.regions[0]["box"]) if row.regions else ""
    copied = f"{row.copied['copies']} of {row.copied['generations']} copy it" if row.copied else ""
    name = row.name if len(row.name) <= 40 else f"{row.name[:24]}...{row.name[-13:]}"
    return name, str(row.verdict), f"{row.severity:.1f}x", p, where, copied
