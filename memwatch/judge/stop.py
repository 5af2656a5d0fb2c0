"""Stop: whether training ends, by a pure function of state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memwatch.config import StopConfig
from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Finding

EXIT_CODE = 3  # of scripts and commands: training is to end, or something is memorized


@dataclass(frozen=True)
class StopState:
    """What the stop rule remembers between events.

    Attributes:
        streak: events in a row with enough memorized probes.
        reason: why training is to end; set once and never taken back.
        copied: names of the probes that a generation has copied so far.
    """

    streak: int = 0
    reason: str | None = None
    copied: Sequence[str] = ()


def decide_stop(state: StopState, findings: Sequence[Finding], step: int, rule: StopConfig) -> StopState:
    """The next state; it has a ``reason`` when training is to end.

    Args:
        findings: of this event.
        rule: how many probes it takes, of which verdict, severity and p-value, for how many events in a row, and
            whether a generation must have copied them.
    """
    if state.reason is not None or not rule.enabled:
        return state
    now = [f.name for f in findings if f.proof is not None and f.proof.copied]
    copied = tuple(dict.fromkeys([*state.copied, *now]))
    counted = [f.name for f in findings if _counts(f, rule) and (f.name in copied or not rule.require_copy)]
    if len(counted) < rule.num_probes:
        return StopState(copied=copied)
    streak = state.streak + 1
    if streak < rule.patience:
        return StopState(streak, copied=copied)
    return StopState(streak, f"step {step}: {len(counted)} probe(s) {rule.verdict}: {', '.join(counted)}", copied)


def _counts(finding: Finding, rule: StopConfig) -> bool:
    p = finding.p if finding.p is not None else math.inf
    enough = finding.verdict is Verdict.MEMORIZED or (
        finding.verdict.is_evidence and rule.verdict == Verdict.SUSPICIOUS
    )
    return enough and finding.severity >= rule.min_severity and p <= rule.max_p
