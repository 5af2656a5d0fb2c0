"""Stop: whether training ends. A pure function of state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memwatch.config import StopConfig
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Finding


@dataclass(frozen=True)
class StopState:
    """Memory of the stop rule.

    Attributes:
        streak: events in a row with enough memorized probes.
        reason: set once and never taken back.
    """

    streak: int = 0
    reason: str | None = None


def decide_stop(state: StopState, findings: Sequence[Finding], step: int, rule: StopConfig) -> StopState:
    """The next state, with a ``reason`` when training is to end."""
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
