"""Alerts: from numbers to words, with patience. Pure functions of state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from memwatch.config import AlertsConfig


class Verdict(StrEnum):
    """What the rule says of a probe at one event, see ``judge``."""

    MEMORIZED = "memorized"
    SUSPICIOUS = "suspicious"
    NO_EVIDENCE = "no evidence"
    INCONCLUSIVE = "inconclusive"

    @property
    def is_evidence(self) -> bool:
        """Whether it speaks of something stored: suspicious or memorized."""
        return self in (Verdict.SUSPICIOUS, Verdict.MEMORIZED)


@dataclass(frozen=True)
class Evidence:
    """What one event says about one probe.

    Attributes:
        severity: reduction factor of the strongest region; 1 when there is none.
        severity_low: the same less two standard errors (of its log).
        statistic: natural log of the largest factor over levels and regions, which ``p`` judges; NaN where nothing was
            compared.
        p: p-value against the controls; ``None`` without controls.
        smallest_p: the smallest that these controls could give.
        finite: whether every number was finite.
        compared: whether there was a baseline to compare with.
    """

    severity: float
    severity_low: float
    p: float | None
    smallest_p: float
    statistic: float = math.nan
    finite: bool = True
    compared: bool = True


@dataclass(frozen=True)
class ProbeState:
    """Memory of one probe between events.

    Attributes:
        streak: events in a row with evidence.
        since: step at which the streak began.
        last_clean: step of the last event without evidence.
        verdict: of the last event.
        finite: whether the last event's numbers were finite.
    """

    streak: int = 0
    since: int | None = None
    last_clean: int | None = None
    verdict: Verdict = Verdict.INCONCLUSIVE
    finite: bool = True


def judge(state: ProbeState, evidence: Evidence, step: int, rule: AlertsConfig) -> tuple[ProbeState, str]:
    """The probe's next state, which holds the verdict, and the reason in words.

    - memorized: evidence (severity and p-value) in ``patience`` events in a row.
    - suspicious: evidence, but not yet that often; or, without controls, severity alone.
    - no evidence: the severity is too small, its error bar reaches 1x, or controls show as much.
    - inconclusive: no judgement is possible.
    """
    inconclusive = replace(state, streak=0, since=None, verdict=Verdict.INCONCLUSIVE, finite=evidence.finite)
    if not evidence.finite:
        return inconclusive, "non-finite values in the model's output"
    if not evidence.compared:
        return inconclusive, "nothing earlier to compare with"
    needed = rule.min_severity if evidence.p is not None else max(rule.min_severity, rule.uncalibrated_severity)
    if evidence.severity < needed or evidence.severity_low <= 1:
        clean = ProbeState(last_clean=step, verdict=Verdict.NO_EVIDENCE)
        why = f"an alert needs {needed:g}x" if evidence.severity < needed else "its error bar reaches 1x"
        return clean, f"variance reduction {evidence.severity:.1f}x ({why})"
    if evidence.p is not None and evidence.smallest_p > rule.max_p:
        cannot = f"these controls cannot give p below {evidence.smallest_p:.3f} (max_p {rule.max_p:g})"
        return inconclusive, f"{evidence.severity:.1f}x, but {cannot}"
    if evidence.p is not None and evidence.p > rule.max_p:
        clean = ProbeState(last_clean=step, verdict=Verdict.NO_EVIDENCE)
        return clean, f"{evidence.severity:.1f}x, but p = {evidence.p:.3f}: controls show as much"
    if evidence.p is None:  # never counts towards memorized
        suspicious = ProbeState(0, None, state.last_clean, Verdict.SUSPICIOUS)
        return suspicious, f"{evidence.severity:.1f}x, uncalibrated (no controls)"
    streak, since = state.streak + 1, state.since if state.streak else step
    found = f"{evidence.severity:.1f}x, p = {evidence.p:.3f}"
    if streak < rule.patience:
        verdict, reason = Verdict.SUSPICIOUS, f"{found}, event {streak} of {rule.patience}"
    else:
        verdict, reason = Verdict.MEMORIZED, f"{found}, since step {since}"
    return ProbeState(streak, since, state.last_clean, verdict), reason
