"""Alerts: from numbers to words, with patience. Pure functions of state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from memwatch.config import AlertsConfig
from memwatch.judge.calibration import largest_p
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


RANK_P = 0.05  # a rank p-value that contradicts no call


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
        if evidence.severity < rule.uncalibrated_severity:
            return clean, f"{effect}, uncalibrated: without controls it takes {rule.uncalibrated_severity:g}x"
        return suspicious, f"{effect}, uncalibrated (no controls)"
    if evidence.p is None or evidence.rank_p is None:
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
    assert evidence.rank_p is not None
    if evidence.severity < rule.min_severity:
        return f"an effect below {rule.min_severity:g}x"
    if evidence.p > allowed:
        return f"not rare enough to call in a whole run (p <= {allowed:.1g})"
    if not _rare_by_rank(evidence.rank_p, evidence.num_controls):
        return f"but as many controls are as high (rank p = {evidence.rank_p:.2f})"
    whole_set_is_stored = evidence.severity_peers >= rule.min_severity  # its own company is no excuse then
    p_peers = evidence.rank_p_peers
    if p_peers is not None and not _rare_by_rank(p_peers, evidence.num_peers) and not whole_set_is_stored:
        return f"but no more than ordinary training images show (rank p = {p_peers:.2f})"
    return None


def _rare_by_rank(p: float, n: int) -> bool:
    """Whether a rank p-value is as small as it should be, or as small as n references can make it."""
    return p <= max(RANK_P, 1 / (1 + n))
