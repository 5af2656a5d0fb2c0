"""Alerts: from numbers to words, with patience. Pure functions of state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from memwatch.config import AlertsConfig
from memwatch.judge.statistic import largest_p, upper_bound
from memwatch.measure.probes import MIN_CONTROLS


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
    """What one event says about one probe; severity and p-values belong to the same region.

    Attributes:
        severity: reduction factor of the region that decides, on draws that did not propose it; 1 when there is none.
        severity_low: its lower 97.5 % bound.
        p: p-value against the controls, for any place and size in the map; ``None`` without enough controls, and where
            nothing could be compared.
        rank_p: the same by ranks, which assumes less and cannot fall below ``1 / (1 + num_controls)``.
        z_score: what ``p`` rests on: predictive standard deviations above the controls.
        num_controls: finite controls of the probe's own kind. ``any_controls``: whether there are any of either kind.
        rank_p_peers: by ranks against ordinary training images; ``None`` without them.
        num_peers: how many of those there are. severity_peers: their median severity.
        finite: whether every number was finite.
        compared: whether there was a baseline to compare with.
    """

    severity: float = 1.0
    severity_low: float = 1.0
    p: float | None = None
    rank_p: float | None = None
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
    """Memory of one probe between events.

    Attributes:
        events: at how many it was compared; the false-alarm budget is spent by this number.
        streak: events in a row that controls do not show, whatever their size.
        since: step at which the streak began.
        is_enough: whether the last event's evidence is enough for ``memorized``, but perhaps for patience or the audit.
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


UNCALIBRATED_SEVERITY = 2.0  # reduction factor from which a probe is suspicious where there are no controls
RANK_P = 0.05  # a rank p-value against ordinary training images that contradicts no call


def judge(
    state: ProbeState,
    evidence: Evidence,
    step: int,
    rule: AlertsConfig,
    num_probes: int,
    planned: int | None = None,
) -> tuple[ProbeState, str]:
    """The probe's next state, which holds the verdict, and the reason in words.

    - memorized: an effect that matters, and one that the run's false-alarm budget allows to call, after evidence in
      ``patience`` events in a row, this one included. What only flickers is not called.
    - suspicious: more than controls show, but not by so much or not yet so often; without any controls, a large effect.
    - no evidence: no effect that its error bar tells from none, or controls show as much.
    - inconclusive: no judgement is possible.

    Args:
        num_probes: that share the run's budget.
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
    effect = f"{evidence.severity:.1f}x"
    if evidence.severity_low <= 1:
        return clean, f"variance reduction {effect}: its error bar reaches 1x"
    if not evidence.any_controls:
        if evidence.severity < UNCALIBRATED_SEVERITY:
            return clean, f"{effect}, uncalibrated: without controls it takes {UNCALIBRATED_SEVERITY:g}x"
        return suspicious, f"{effect}, uncalibrated (no controls)"
    if evidence.p is None:
        few = f"{evidence.num_controls} usable controls of its kind, and it takes {MIN_CONTROLS}"
        return replace(unknown, events=events), f"{effect}, but there are {few}"
    found = f"{effect}, p = {evidence.p:.2g}"
    if evidence.p > rule.max_p:
        return clean, f"{found}: controls show as much"
    streak, since = state.streak + 1, state.since if state.streak else step
    going = replace(suspicious, streak=streak, since=since)
    allowed = largest_p(events, false_alarms_per_run=rule.false_alarms_per_run, num_probes=num_probes, planned=planned)
    if (short := _short_of_memorized(evidence, rule, allowed)) is not None:
        return going, f"{found}, {short}"
    enough = replace(going, is_enough=True)
    if streak < rule.patience:
        return enough, f"{found}, event {streak} of {rule.patience}"
    rarest = min(state.rarest_p, evidence.p)
    return replace(enough, verdict=Verdict.MEMORIZED, called=True, rarest_p=rarest), f"{found}, since step {since}"


def _short_of_memorized(evidence: Evidence, rule: AlertsConfig, allowed: float) -> str | None:
    """Why one event is not enough for ``memorized``, for which p may be ``allowed``; ``None`` where it is."""
    assert evidence.p is not None
    if evidence.severity < rule.min_severity:
        return f"an effect below {rule.min_severity:g}x"
    if evidence.p > allowed:
        return f"p must be at most {allowed:.1g} to keep the run's false-alarm rate"
    whole_set_is_stored = evidence.severity_peers >= rule.min_severity  # its own company is no excuse then
    p_peers = evidence.rank_p_peers
    if p_peers is not None and not _rare_by_rank(p_peers, evidence.num_peers) and not whole_set_is_stored:
        return f"but no more than ordinary training images show (rank p = {p_peers:.2f})"
    return None


def _rare_by_rank(p: float, n: int) -> bool:
    """Whether a rank p-value is as small as it should be, or as small as n references can make it."""
    return p <= max(RANK_P, 1 / (1 + n))


# --- audit ---


class Judged(Protocol):
    """A control after this event."""

    @property
    def state(self) -> ProbeState: ...


@dataclass(frozen=True)
class Audit:
    """What the rule said of the controls so far.

    Attributes:
        called: controls that were called memorized at any event so far.
        of: controls that were judged.
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
        """The p-value that a probe may have at most to be called all the same.

        A called control contradicts the promise: p-values are not what they say. What they still give is an order, in
        which nothing stored is as likely to be the rarest as any control is. So a probe needs twice the called
        control's evidence (the square of its p-value). Where evidence, ``-log p``, has an exponential tail, a probe
        comes to twice the largest of N by chance with probability ``2 / ((N + 1)(N + 2))``.
        """
        return self.rarest_p**2

    def __str__(self) -> str:
        if not self.of:
            return "false-alarm check: there are no controls to run it on"
        called = f"{self.called} of {self.of} controls {'was' if self.called == 1 else 'were'}"
        return f"false-alarm check: {called if self.called else f'none of {self.of} controls was'} called"


def audit_of(controls: Sequence[Judged]) -> Audit:
    """What the rule has said of these controls up to this event."""
    called = [control.state.rarest_p for control in controls if control.state.called]
    return Audit(len(called), len(controls), min(called, default=1.0))
