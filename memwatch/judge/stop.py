"""Stop: whether training ends, by a pure function of state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memwatch.config import StopConfig
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Finding


@dataclass(frozen=True)
class StopState:
    """What the stop rule remembers between events.

    Attributes:
        streak: events in a row with enough memorized probes.
        reason: why training is to end; set once and never taken back.
    """

    streak: int = 0
    reason: str | None = None


def decide_stop(state: StopState, findings: Sequence[Finding], step: int, rule: StopConfig) -> StopState:
    """The next state; it has a ``reason`` when training is to end.

    Args:
        findings: of this event.
        rule: how many probes it takes, of which severity and p-value, and for how many events in a row.
    """
    if state.reason is not None or not rule.enabled:
        return state
    counted = [f.name for f in findings if _counts(f, rule)]
    if len(counted) < rule.num_probes:
        return StopState()
    streak = state.streak + 1
    if streak < rule.patience:
        return StopState(streak)
    return StopState(streak, f"step {step}: {len(counted)} probe(s) memorized: {', '.join(counted)}")


def _counts(finding: Finding, rule: StopConfig) -> bool:
    p = finding.p if finding.p is not None else math.inf
    return finding.verdict is Verdict.MEMORIZED and finding.severity >= rule.min_severity and p <= rule.max_p
