"""Screened events on finished runs: what memwatch would have measured, and what it misses against measuring all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memwatch.bench.page import PACKAGES, markdown_table, plan_of
from memwatch.bench.results import RunResult, run_product
from memwatch.bench.runs import Finished
from memwatch.config import MemWatchConfig
from memwatch.judge.findings import Finding, Judgement
from memwatch.measure.passes import count_passes
from memwatch.report.about import machine

PAGE = """# Screened against full

Written by `{command}`. {machine}.

{runs}

By default an event runs the network forward only, on everything, and measures curvature just where that shows more than
chance (`screen`). Here the same runs are judged that way, and with curvature measured on everything at every event
(`screen: false`).

* `same`: probe-events with the same verdict, of how many. `lost`, `gained`: those that only the full look, or only the
  screened one, calls suspicious or memorized. `called otherwise`: items that only one of the two calls memorized at any
  event.
* `chosen`: share of probes, and of controls, whose curvature was measured. Most items of these runs are planted,
  learned or trained on, so that far more of them stand out than of the probes of an ordinary run.
* `passes`: network passes of the screened events, relative to the full ones.

{table}

All together: {same} of {total} verdicts are the same ({share:.1%}).
"""


def write_screening(runs: Sequence[Finished], config: MemWatchConfig, folder: Path, command: str) -> Path:
    """``screen.md`` in ``folder``.

    Raises:
        ValueError: ``config`` does not screen, or the runs did not measure what it asks for.
    """
    if not config.screens:
        raise ValueError("the configuration does not screen events, so there is nothing to compare")
    rows = [row_of(run_product(config, run), run_product(replace(config, screen=False), run), config) for run in runs]
    same, total = (sum(int(row["same"].split("/")[i]) for row in rows) for i in (0, 1))
    text = PAGE.format(
        command=command,
        machine=machine(*PACKAGES),
        runs=markdown_table([plan_of(run) for run in runs if run.planted]),
        table=markdown_table(rows),
        same=same,
        total=total,
        share=same / total,
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "screen.md"
    file.write_text(text, encoding="utf-8")
    return file


def row_of(screened: RunResult, full: RunResult, config: MemWatchConfig) -> dict[str, Any]:
    """One line of the table."""
    same = lost = gained = total = 0
    for step, judgement in full.events.items():
        now = {f.name: f.verdict for f in screened.events[step].findings}
        for f in judgement.findings:
            total += 1
            same += now[f.name] is f.verdict
            lost += f.verdict.is_evidence and not now[f.name].is_evidence
            gained += now[f.name].is_evidence and not f.verdict.is_evidence
    events = screened.events.values()
    names = set(full.first_alert) | set(screened.first_alert)
    other = sorted(name for name in names if (name in full.first_alert) != (name in screened.first_alert))
    return {
        "run": screened.run.name,
        "same": f"{same}/{total}",
        "lost": lost,
        "gained": gained,
        "called otherwise": ", ".join(other) or "none",
        "chosen": chosen_share(f for event in events for f in event.findings),
        "chosen controls": chosen_share(f for event in events for f in event.controls),
        "passes": passes_share(screened, config),
    }


def chosen_share(findings: Iterable[Finding]) -> float:
    """The share of findings whose curvature was measured."""
    measured = [f.observation.has_curvature for f in findings]
    return sum(measured) / max(1, len(measured))


def passes_share(screened: RunResult, config: MemWatchConfig) -> float:
    """Passes of the screened events, relative to those of the same events measured in full."""

    def cost(event: Judgement) -> float:
        number = len(event.everything)
        return count_passes(config, number, 0).of_event(event.num_measured / number)

    spent = sum(cost(event) for event in screened.events.values())
    return spent / sum(count_passes(config, len(e.everything), 0).full for e in screened.events.values())
