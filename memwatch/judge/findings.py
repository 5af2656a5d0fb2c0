"""Findings: what the judge says of every observation of one event.

Maps -> regions -> calibration -> verdicts -> audit, as pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.judge.regions import Region, evidence_of, regions_of
from memwatch.judge.statistic import Compared, Null, References, Screened
from memwatch.judge.verdict import Audit, Evidence, ProbeState, Verdict, audit_of, judge
from memwatch.measure.copies import Proof
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals


@dataclass(frozen=True)
class Finding:
    """One probe at one event.

    Attributes:
        observation: what was measured.
        signals: every map of the observation; ``None`` where the measurements are not finite.
        evidence: the numbers that the verdict rests on.
        state: the probe's state after this event; it holds the verdict.
        reason: why the verdict is what it is, in words.
        regions: the one that decides first; none without evidence.
        labels: int ``(h, w)`` of the map: i inside ``regions[i - 1]``, 0 outside; ``None`` when nothing was compared.
        is_alert: whether this event is news: a worse verdict, or output that is no longer finite.
        proof: what the caption generates; ``None`` where that was not asked, see ``memwatch.judge.proof``.
    """

    observation: Observation
    signals: Signals | None
    evidence: Evidence
    state: ProbeState
    reason: str
    regions: tuple[Region, ...]
    labels: np.ndarray | None
    is_alert: bool
    proof: Proof | None = None

    @property
    def name(self) -> str:
        return self.observation.name

    @property
    def verdict(self) -> Verdict:
        return self.state.verdict

    @property
    def is_worth_a_look(self) -> bool:
        """Whether it has evidence or news."""
        return self.verdict.is_evidence or self.is_alert

    @property
    def severity(self) -> float:
        """The reduction factor of the region that decides; 1 when there is none."""
        return self.evidence.severity

    @property
    def p(self) -> float | None:
        """The p-value against the controls; ``None`` without enough of them."""
        return self.evidence.p


@dataclass(frozen=True)
class Judgement:
    """Everything that the judge says of one event.

    Attributes:
        findings: of the watched probes, in their order.
        controls: of the controls, each judged by the others. peers: of the ordinary training images.
        audit: how often the rule has called a control.
        states: by name, of probes and controls after this event.
        num_rotated: how many rows were rotated in at this event; only those with evidence or news are findings.
        num_measured: how many were measured with curvature, be it that others are judged by them.
    """

    findings: tuple[Finding, ...] = ()
    controls: tuple[Finding, ...] = ()
    peers: tuple[Finding, ...] = ()
    audit: Audit = field(default_factory=Audit)
    states: Mapping[str, ProbeState] = field(default_factory=dict)
    num_rotated: int = 0
    num_measured: int = 0

    @property
    def everything(self) -> tuple[Finding, ...]:
        """Of probes, controls and peers."""
        return (*self.findings, *self.controls, *self.peers)


def judge_event(
    observations: Sequence[Observation],
    states: Mapping[str, ProbeState],
    step: int,
    config: MemWatchConfig,
    planned: int | None = None,
    num_rotating: int = 0,
    screened: Screened | None = None,
) -> Judgement:
    """Judge all probes of one event, and run the same rule on every control against the others.

    Rows in rotation have half of the run's false-alarm budget together, and the probes the other half.

    Args:
        observations: of probes, controls and peers, with curvature where it was measured.
        states: by name, what was remembered before this event.
        planned: how many events the run will have, if known.
        num_rotating: how many rows are rotated in during the run.
        screened: what the screen saw and chose; without it everything is judged by ``observations``.
    """
    watched = [o for o in observations if not o.probe.is_control and not o.probe.is_peer]
    controls, peers = ([o for o in observations if getattr(o.probe, kind)] for kind in ("is_control", "is_peer"))
    halves, num_fixed = 2 if num_rotating else 1, sum(not o.probe.in_rotation for o in watched)

    def finding(o: Observation, among: Compared, typical: float | None = None) -> Finding:
        """``typical``: severity of the peers; ``None`` for what is not compared with them."""
        state, sharing = states.get(o.name, ProbeState()), num_rotating if o.probe.in_rotation else max(1, num_fixed)
        ordinary = Null.of([]) if typical is None else among.peers_of(o.probe)
        references = References(among.controls_of(o.probe), ordinary, bool(controls), typical or 1.0)
        o, signals = among.observations[o.name], among.signals[o.name]
        return judge_probe(o, signals, references, state, step, config, halves * sharing, planned)

    def with_typical(among: Compared) -> tuple[Compared, float]:
        severities = [finding(o, among).severity for o in among.observations.values() if o.probe.is_peer]
        return among, float(np.median(severities)) if severities else 1.0

    full, screen = map(with_typical, Compared.both(observations, screened, config.signals))
    basis = {o.name: full if screened is None or o.name in screened.chosen else screen for o in observations}
    audited, judged_peers = (tuple(finding(o, basis[o.name][0]) for o in group) for group in (controls, peers))
    audit = audit_of([f for f in audited if f.evidence.p is not None])
    findings = tuple(finding(o, *basis[o.name]) for o in watched)
    findings = tuple(capped(f, audit, states.get(f.name, ProbeState())) for f in findings)
    new_states = {**states} | {f.name: f.state for f in (*findings, *audited)}
    told = tuple(f for f in findings if not f.observation.probe.in_rotation or f.is_worth_a_look)
    measured = sum(o.has_curvature for o in observations)
    return Judgement(told, audited, judged_peers, audit, new_states, len(watched) - num_fixed, measured)


def judge_probe(
    observation: Observation,
    signals: Signals | None,
    references: References,
    state: ProbeState,
    step: int,
    config: MemWatchConfig,
    num_probes: int = 1,
    planned: int | None = None,
) -> Finding:
    """One probe's finding.

    Args:
        references: what it is compared with.
        state: the probe's state before this event.
        num_probes, planned: probes that share the run's false-alarm budget, and its number of events, if known.
    """
    regions, labels = regions_of(observation, signals, references)
    evidence = evidence_of(observation, signals, regions, references)
    next_state, reason = judge(state, evidence, step, config.alerts, num_probes, planned)
    if not next_state.verdict.is_evidence and labels is not None:  # every map has a highest place; it needs evidence
        regions, labels = (), np.zeros_like(labels)
    news = is_alert(state, next_state, evidence)
    return Finding(observation, signals, evidence, next_state, reason, regions, labels, news)


def capped(finding: Finding, audit: Audit, before: ProbeState) -> Finding:
    """The finding as it may be told after the audit.

    Suspicious at most where the audit contradicts the promise, unless it is far rarer than what contradicts, see
    ``Audit.p_needed``.

    Args:
        before: the probe's state before this event.
    """
    p = finding.evidence.p
    if finding.verdict is not Verdict.MEMORIZED or p is None or not audit.called or p <= audit.p_needed:
        return finding
    why = f"the same rule calls {audit.called} of {audit.of} controls, against its promise (p = {audit.rarest_p:.2g})"
    state = replace(finding.state, verdict=Verdict.SUSPICIOUS, called=before.called, rarest_p=before.rarest_p)
    news = is_alert(before, state, finding.evidence)
    return replace(finding, state=state, reason=f"{finding.reason}; not called memorized, because {why}", is_alert=news)


def is_alert(before: ProbeState, after: ProbeState, evidence: Evidence) -> bool:
    """Whether this event is news: a worse verdict that speaks of evidence, or output that is no longer finite."""
    if not evidence.finite:
        return before.finite
    if after.verdict is Verdict.MEMORIZED:
        return before.verdict is not Verdict.MEMORIZED
    return after.verdict.is_evidence and not before.verdict.is_evidence
