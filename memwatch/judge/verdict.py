"""The rule: from the numbers of one event to a verdict, with patience and a false-alarm budget.

The false-alarm check applies the same rule to the controls, see ``Audit``. Pure functions of state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from memwatch.config import AlertsConfig
from memwatch.judge.statistic import largest_p, upper_bound
from memwatch.measure.probes import MIN_CONTROLS

UNCALIBRATED_SEVERITY = 2.0  # reduction factor from which a probe is suspicious where there are no controls
RANK_P = 0.05  # the largest rank p-value against ordinary training images that does not stop a call


class Verdict(StrEnum):
    """What the rule says of a probe at one event, see ``judge``."""

    MEMORIZED = "memorized"
    SUSPICIOUS = "suspicious"
    NO_EVIDENCE = "no evidence"
    INCONCLUSIVE = "inconclusive"

    @property
    def is_evidence(self) -> bool:
        """Whether it says that something may be stored: suspicious or memorized."""
        return self in (Verdict.SUSPICIOUS, Verdict.MEMORIZED)


@dataclass(frozen=True)
class Evidence:
    """The numbers of one probe at one event; severity and p-values belong to the same region.

    Attributes:
        severity: reduction factor of the region that decides, on draws that did not propose it; 1 when there is none.
        severity_low: its lower 97.5 % bound.
        p: p-value against the controls, for any place and size in the map; ``None`` without enough controls, and where
            nothing could be compared.
        z_score: what ``p`` rests on: predictive standard deviations above the controls.
        num_controls: finite controls of the probe's own kind. any_controls: whether there are any of either kind.
        rank_p_peers: by ranks against ordinary training images; ``None`` without them.
        num_peers: how many of those there are. severity_peers: their median severity.
        finite: whether every number was finite.
        compared: whether there was a baseline to compare with.
    """

    severity: float = 1.0
    severity_low: float = 1.0
    p: float | None = None
    z_score: float | None = None
    num_controls: int = 0
    any_controls: bool = False
    rank_p_peers: float | None = None
    num_peers: int = 0
    severity_peers: float = 1.0
    finite: bool = True
    compared: bool = True


@dataclass(frozen=True)
class ProbeState:
    """What is remembered of one probe between events.

    Attributes:
        events: at how many it was compared; the false-alarm budget is spent by this number.
        streak: events in a row at which it exceeded the controls, whatever its severity.
        since: step at which the streak began.
        is_enough: whether the last event met the criteria of ``memorized``, but perhaps for patience and the audit.
        last_clean: step of the last event without evidence.
        verdict: of the last event.
        finite: whether the last event's numbers were finite.
        called: whether it was ever called memorized. rarest_p: the smallest p-value of those events.
    """

    events: int = 0
    streak: int = 0
    since: int | None = None
    is_enough: bool = False
    last_clean: int | None = None
    verdict: Verdict = Verdict.INCONCLUSIVE
    finite: bool = True
    called: bool = False
    rarest_p: float = 1.0


def judge(
    state: ProbeState,
    evidence: Evidence,
    step: int,
    rule: AlertsConfig,
    num_probes: int,
    planned: int | None = None,
) -> tuple[ProbeState, str]:
    """The probe's next state, which holds the verdict, and the reason in words, without effect and p-value.

    - memorized: severe, rare enough for the run's budget, and with evidence in ``patience`` events in a row.
    - suspicious: it exceeds the controls, but not by that much or that often; or, without controls, it is severe.
    - no evidence: the error bar includes no effect, or the controls show as much.
    - inconclusive: no judgement is possible.

    Args:
        num_probes: how many share the run's false-alarm budget.
        planned: how many events the run will have, if known.
    """
    quiet = replace(state, streak=0, since=None, is_enough=False, finite=evidence.finite)
    unknown = replace(quiet, verdict=Verdict.INCONCLUSIVE)
    if not evidence.finite:
        return unknown, "non-finite values in the model's output"
    if not evidence.compared:
        return unknown, "nothing earlier to compare with"
    events = state.events + 1
    clean = replace(quiet, events=events, last_clean=step, verdict=Verdict.NO_EVIDENCE)
    suspicious = replace(quiet, events=events, verdict=Verdict.SUSPICIOUS)
    if evidence.severity_low <= 1:
        return clean, "its error bar includes no effect"
    if not evidence.any_controls:
        if evidence.severity < UNCALIBRATED_SEVERITY:
            return clean, f"without controls a probe is suspicious from {UNCALIBRATED_SEVERITY:g}x on"
        return suspicious, "uncalibrated: there are no controls"
    if evidence.p is None:
        few = f"there are {evidence.num_controls} usable controls of its kind, and a p-value takes {MIN_CONTROLS}"
        return replace(unknown, events=events), few
    if evidence.p > rule.max_p:
        return clean, "the controls show as much"
    streak, since = state.streak + 1, state.since if state.streak else step
    going = replace(suspicious, streak=streak, since=since)
    allowed = largest_p(events, false_alarms_per_run=rule.false_alarms_per_run, num_probes=num_probes, planned=planned)
    if (short := short_of_memorized(evidence, rule, allowed)) is not None:
        return going, short
    enough = replace(going, is_enough=True)
    if streak < rule.patience:
        return enough, f"evidence at {streak} of {rule.patience} events in a row"
    rarest = min(state.rarest_p, evidence.p)
    return replace(enough, verdict=Verdict.MEMORIZED, called=True, rarest_p=rarest), f"evidence since step {since}"


def short_of_memorized(evidence: Evidence, rule: AlertsConfig, allowed: float) -> str | None:
    """Why one event is not enough for ``memorized``, for which p may be ``allowed``; ``None`` where it is enough."""
    assert evidence.p is not None
    if evidence.severity < rule.min_severity:
        return f"memorized takes {rule.min_severity:g}x, and this is {evidence.severity:.2f}x"
    if evidence.p > allowed:
        return f"p must be at most {allowed:.1g} to keep the run's false-alarm rate"
    rank_p, smallest = evidence.rank_p_peers, 1 / (1 + evidence.num_peers)
    whole_set_is_stored = evidence.severity_peers >= rule.min_severity  # then the peers show nothing ordinary
    if rank_p is not None and rank_p > max(RANK_P, smallest) and not whole_set_is_stored:
        return f"ordinary training images show as much (rank p = {rank_p:.2f})"
    return None


def is_alert(before: ProbeState, after: ProbeState) -> bool:
    """Whether this event is news: the verdict became suspicious or memorized, or the output is no longer finite."""
    if not after.finite:
        return before.finite
    if after.verdict is Verdict.MEMORIZED:
        return before.verdict is not Verdict.MEMORIZED
    return after.verdict.is_evidence and not before.verdict.is_evidence


# --- the false-alarm check ---


@dataclass(frozen=True)
class Audit:
    """What the rule has said of the controls so far.

    Attributes:
        called: controls that were called memorized at any event so far. of: controls that were judged.
        rarest_p: the smallest p-value at which a control was called; 1 where none was.
    """

    called: int = 0
    of: int = 0
    rarest_p: float = 1.0

    @property
    def at_most(self) -> float:
        """The largest rate of false alarms per probe and run that this leaves plausible, at 95 % confidence."""
        return upper_bound(self.called, self.of) if self.of else 1.0

    @property
    def p_needed(self) -> float:
        """The largest p-value at which a probe is called memorized although a control was.

        A called control shows that p-values are too small; their order still counts. So a probe needs twice the called
        control's evidence, ``-log p``, hence the square of its p-value. Where evidence has an exponential tail, chance
        brings twice the largest of N with probability ``2 / ((N + 1)(N + 2))``.
        """
        return self.rarest_p**2

    def __str__(self) -> str:
        if not self.of:
            return "false-alarm check: no control has been judged"
        called = f"{self.called} of {self.of} controls {'was' if self.called == 1 else 'were'}"
        return f"false-alarm check: {called if self.called else f'none of {self.of} controls was'} called"


def audit_of(controls: Sequence[ProbeState]) -> Audit:
    """What the rule has said of the controls with these states."""
    called = [state.rarest_p for state in controls if state.called]
    return Audit(len(called), len(controls), min(called, default=1.0))
