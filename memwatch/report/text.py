"""A run's verdicts as Markdown and as plain values, for pull requests and pipelines."""

from __future__ import annotations

from typing import Any

from memwatch.report.advice import advice_of, headline, not_watched
from memwatch.report.copied import proof_words
from memwatch.report.forecasts import ahead
from memwatch.report.history import Row, Run


def as_markdown(run: Run) -> str:
    """What the page says, in the words and tables of a comment."""
    last = run.last
    lines = [f"# {headline(run)}", "", f"`{run.folder}`, step {last.step}: {last.counts()}. {calibration(run)}.", ""]
    lines += ["| probe | verdict | effect | p | region, px | area | generations | since |", "|---" * 8 + "|"]
    lines += [f"| {' | '.join(map(escaped, cells(row)))} |" for row in last.worst_first]
    if run.alerts:
        lines += ["", "## Alerts", ""]
        lines += [
            f"- step {step}: {escaped(row.name)} is {row.verdict}. {escaped(row.reason)}." for step, row in run.alerts
        ]
    if worst := [row for row in last.worst_first if row.verdict.is_evidence]:
        lines += ["", "## What to do", ""]
        lines += [f"- {escaped(row.name)}: {escaped(advice_of(row))}" for row in worst]
    if coming := ahead(run):
        lines += ["", "## Forecast", "", *(f"- {escaped(sentence)}" for sentence in coming)]
    lines += ["", "## What was not watched", "", *(f"- {sentence}" for sentence in not_watched(run))]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """A probe under the header."""
    box = "{}, {} to {}, {}".format(*row.regions[0]["box"]) if row.regions else "-"
    p, since = "-" if row.p is None else f"{row.p:.2g}", "-" if row.since is None else str(row.since)
    return [
        row.name,
        str(row.verdict),
        f"{row.severity:.2f}x",
        p,
        box,
        f"{row.area:.0%}",
        proof_words(row, brief=True) or "-",
        since,
    ]


def escaped(text: str) -> str:
    """A cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def calibration(run: Run) -> str:
    """What the controls say."""
    return run.last.audit if run.last.calibrated else "Uncalibrated: there are no controls"


def as_json(run: Run) -> dict[str, Any]:
    """Plain values: the headline, the last event's probes, all alerts, and whether anything is memorized."""
    last = run.last
    return {
        "headline": headline(run),
        "step": last.step,
        "is_memorized": bool(run.memorized),
        "memorized": run.memorized,
        "stop_reason": run.events[-1].stop_reason,
        "audit": last.audit,
        "calibrated": last.calibrated,
        "overhead": run.events[-1].overhead,
        "errors": run.events[-1].errors,
        "probes": [_probe(row) for row in last.worst_first],
        "alerts": [{"step": step} | _probe(row) for step, row in run.alerts],
        "forecasts": ahead(run),
        "not_watched": not_watched(run),
    }


def _probe(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "prompt": row.prompt,
        "verdict": str(row.verdict),
        "severity": row.severity,
        "p": row.p,
        "since": row.since,
        "reason": row.reason,
        "regions": list(row.regions),
        "copied": row.copied,
        "advice": advice_of(row),
    }
