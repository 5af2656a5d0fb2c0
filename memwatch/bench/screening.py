"""Screened events on finished runs: what memwatch would have measured, and what it misses against measuring all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from memwatch.bench.results import RunResult, run_product
from memwatch.config import MemWatchConfig
from memwatch.judge.findings import Judgement
from memwatch.measure.passes import count_passes


def screen_table(results: Sequence[RunResult], config: MemWatchConfig) -> list[dict[str, Any]]:
    """Run by run, the shipped way against measuring curvature on everything at every event.

    ``same``: probe-events with the same verdict, of how many. ``lost``, ``gained``: those that only the full look, or
    only the screened one, calls suspicious or memorized. ``chosen``: share of probes, and of controls, whose curvature
    was measured. ``passes``: of a later event, mean over events, as a share of the full look's.

    Args:
        results: by ``run_product`` under ``config``, which screens.
    """
    if not config.screens:
        return []
    return [row_of(result, run_product(replace(config, screen=False), result.run), config) for result in results]


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
    names = set(full.first_alert) | set(screened.first_alert)
    other = sorted(name for name in names if (name in full.first_alert) != (name in screened.first_alert))
    return {
        "run": screened.run.name,
        "same": f"{same}/{total}",
        "lost": lost,
        "gained": gained,
        "called otherwise": ", ".join(other) or "none",
        "chosen": chosen_share(screened.events.values(), "findings"),
        "chosen controls": chosen_share(screened.events.values(), "controls"),
        "passes": passes_share(screened, config),
    }


def chosen_share(events: Any, group: str) -> float:
    """The share of findings of a group whose curvature was measured."""
    measured = [f.observation.now.rho is not None for event in events for f in getattr(event, group)]
    return sum(measured) / len(measured)


def passes_share(screened: RunResult, config: MemWatchConfig) -> float:
    """Passes of the screened events, relative to those of the same events measured in full."""

    def cost(event: Judgement) -> float:
        chosen = sum(f.observation.now.rho is not None for f in event.everything) / len(event.everything)
        return count_passes(config, len(event.everything), 0).of_event(chosen)

    spent = sum(cost(event) for event in screened.events.values())
    return spent / sum(count_passes(config, len(e.everything), 0).full for e in screened.events.values())
