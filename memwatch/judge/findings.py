"""Findings: what the judge says of every observation of one event, by pure functions.

maps -> regions -> their numbers (``statistic``) -> verdicts (``verdict``) -> the false-alarm check on the controls
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.judge.copied import Proof
from memwatch.judge.regions import Region, regions_of
from memwatch.judge.statistic import Compared, References, Screened
from memwatch.judge.verdict import Audit, Evidence, ProbeState, Verdict, audit_of, is_alert, judge
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals, factor


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
        proof: what the caption generates; ``None`` where nothing was generated, see ``memwatch.proof``.
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
        controls: of the controls, each judged by the others.
        audit: how often the rule has called a control.
        states: by name, of probes and controls after this event.
        num_rotated: how many rows were rotated in at this event; only those with evidence or news are findings.
        num_measured: how many probes and controls were measured with curvature.
    """

    findings: tuple[Finding, ...] = ()
    controls: tuple[Finding, ...] = ()
    audit: Audit = field(default_factory=Audit)
    states: Mapping[str, ProbeState] = field(default_factory=dict)
    num_rotated: int = 0
    num_measured: int = 0

    @property
    def everything(self) -> tuple[Finding, ...]:
        """Of probes and controls."""
        return (*self.findings, *self.controls)


def judge_event(
    observations: Sequence[Observation],
    states: Mapping[str, ProbeState],
    step: int,
    config: MemWatchConfig,
    planned: int | None = None,
    num_rotating: int = 0,
    screened: Screened | None = None,
) -> Judgement:
    """Judge all probes of one event, and every control by the others with the same rule.

    Rows in rotation have half of the run's false-alarm budget together, and the probes the other half.

    Args:
        observations: of probes and controls, with curvature where it was measured.
        states: by name, what was remembered before this event.
        planned: how many events the run will have, if known.
        num_rotating: how many rows are rotated in during the run.
        screened: what the screen measured and chose; without it everything is judged by ``observations``.
    """
    controls = [o for o in observations if o.probe.is_control]
    watched = [o for o in observations if not o.probe.is_control]
    num_fixed, parts = sum(not o.probe.in_rotation for o in watched), 2 if num_rotating else 1

    def finding(o: Observation, among: Compared) -> Finding:
        state, sharing = states.get(o.name, ProbeState()), num_rotating if o.probe.in_rotation else max(1, num_fixed)
        references = among.references_of(o.probe, any_controls=bool(controls))
        o, signals = among.observations[o.name], among.signals[o.name]
        return judge_probe(o, signals, references, state, step, config, parts * sharing, planned)

    full, screen = Compared.both(observations, screened, config.signals)
    basis = {o.name: full if screened is None or o.name in screened.chosen else screen for o in observations}
    judged_controls = tuple(finding(o, basis[o.name]) for o in controls)
    audit = audit_of([f.state for f in judged_controls if f.p is not None])
    findings = tuple(capped(finding(o, basis[o.name]), audit, states.get(o.name, ProbeState())) for o in watched)
    new_states = {**states} | {f.name: f.state for f in (*findings, *judged_controls)}
    told = tuple(f for f in findings if not f.observation.probe.in_rotation or f.is_worth_a_look)
    measured = sum(o.has_curvature for o in observations)
    return Judgement(told, judged_controls, audit, new_states, len(watched) - num_fixed, measured)


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
    if not next_state.verdict.is_evidence and labels is not None:  # every map has a highest place; a box takes evidence
        regions, labels = (), np.zeros_like(labels)
    return Finding(observation, signals, evidence, next_state, reason, regions, labels, is_alert(state, next_state))


def evidence_of(
    observation: Observation, signals: Signals | None, regions: Sequence[Region], references: References
) -> Evidence:
    """The numbers of the region that decides; without a region, those of no effect."""
    compared = signals is None or signals.decisive is not None
    evidence = Evidence(
        p=1.0 if references.controls.is_enough and compared and observation.finite else None,
        num_controls=len(references.controls),
        any_controls=references.any_controls,
        num_peers=len(references.peers),
        severity_peers=references.severity_peers,
        finite=observation.finite,
        compared=compared,
    )
    if not regions:
        return evidence
    r = regions[0]
    severity, low = factor(max(0.0, r.effect)), factor(r.low)
    return replace(evidence, severity=severity, severity_low=low, p=r.p, z_score=r.z_score, rank_p_peers=r.rank_p_peers)


def capped(finding: Finding, audit: Audit, before: ProbeState) -> Finding:
    """The finding after the false-alarm check.

    If a control was called memorized, a probe is called suspicious at most, unless it is far rarer, see
    ``Audit.p_needed``.

    Args:
        before: the probe's state before this event.
    """
    p = finding.p
    if finding.verdict is not Verdict.MEMORIZED or p is None or not audit.called or p <= audit.p_needed:
        return finding
    why = f"the same rule called {audit.called} of {audit.of} controls memorized (p = {audit.rarest_p:.2g})"
    state = replace(finding.state, verdict=Verdict.SUSPICIOUS, called=before.called, rarest_p=before.rarest_p)
    reason = f"{finding.reason}; not called memorized, because {why}"
    return replace(finding, state=state, reason=reason, is_alert=is_alert(before, state))
