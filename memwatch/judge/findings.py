"""Findings: what the judge says of every observation of one event.

Maps -> regions -> calibration -> verdicts -> audit, as pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from memwatch.config import MemWatchConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict, judge
from memwatch.judge.audit import Audit, audit_of
from memwatch.judge.calibration import NUM_SIZES, Null, size_index, top_means
from memwatch.judge.regions import Region, box_of, components, estimate
from memwatch.measure.copies import Proof
from memwatch.measure.measurement import Observation
from memwatch.measure.signals import Signals, compute_signals, factor


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
        num_turned: how many rows had their turn at this event; only those with evidence or news are findings.
    """

    findings: tuple[Finding, ...] = ()
    controls: tuple[Finding, ...] = ()
    peers: tuple[Finding, ...] = ()
    audit: Audit = field(default_factory=Audit)
    states: Mapping[str, ProbeState] = field(default_factory=dict)
    num_turned: int = 0

    @property
    def everything(self) -> tuple[Finding, ...]:
        """Of probes, controls and peers."""
        return (*self.findings, *self.controls, *self.peers)

    @property
    def num_measured(self) -> int:
        """How many were measured with curvature."""
        return sum(f.observation.has_curvature for f in self.everything)


@dataclass(frozen=True)
class References:
    """What a probe is compared with: controls of its own kind (reference or prompt), and ordinary training images.

    Attributes:
        controls, peers: their null distributions. any_controls: whether there are controls of either kind.
        severity_peers: median severity of the peers.
    """

    controls: Null
    peers: Null
    any_controls: bool
    severity_peers: float = 1.0


def judge_event(
    observations: Sequence[Observation],
    states: Mapping[str, ProbeState],
    step: int,
    config: MemWatchConfig,
    planned: int | None = None,
    num_turns: int = 0,
) -> Judgement:
    """Judge all probes of one event, and run the same rule on every control against the others.

    Where rows take turns, all of them together have half of the run's false-alarm budget, and the probes the other.

    Args:
        observations: of probes, controls and peers.
        states: by name, what was remembered before this event.
        planned: how many events the run will have, if known.
        num_turns: how many rows take turns during the run.
    """
    c = config.signals
    signals = compute_signals(observations, terms=c.terms, against=c.against, combine=c.combine, smooth=c.smooth)
    profiles = {name: profile_of(s) for name, s in signals.items()}
    watched = [o for o in observations if not o.probe.is_control and not o.probe.is_peer]
    controls = [o for o in observations if o.probe.is_control]
    halves, num_fixed = 2 if num_turns else 1, sum(not o.probe.takes_turns for o in watched)

    def finding(o: Observation, references: References) -> Finding:
        state, sharing = states.get(o.name, ProbeState()), num_turns if o.probe.takes_turns else max(1, num_fixed)
        return judge_probe(o, signals[o.name], references, state, step, config, halves * sharing, planned)

    def null(group: Sequence[Observation], like: Observation) -> Null:
        return null_of(profiles, group, like)

    nobody = Null.of([])
    audited = tuple(finding(o, References(null(controls, o), nobody, True)) for o in controls)
    audit = audit_of([f for f in audited if f.evidence.p is not None])
    peers = [o for o in observations if o.probe.is_peer]
    judged_peers = tuple(finding(o, References(null(controls, o), nobody, bool(controls))) for o in peers)
    typical = float(np.median([f.severity for f in judged_peers])) if judged_peers else 1.0
    findings = tuple(
        finding(o, References(null(controls, o), null(peers, o), bool(controls), typical)) for o in watched
    )
    findings = tuple(capped(f, audit, states.get(f.name, ProbeState())) for f in findings)
    new_states = {**states} | {f.name: f.state for f in (*findings, *audited)}
    told = tuple(f for f in findings if not f.observation.probe.takes_turns or f.is_worth_a_look)
    return Judgement(told, audited, judged_peers, audit, new_states, len(watched) - num_fixed)


def null_of(profiles: Mapping[str, np.ndarray], group: Sequence[Observation], like: Observation) -> Null:
    """The null distribution of those of one kind (reference or prompt); ``like`` itself is not among them.

    Args:
        profiles: by name, see ``profile_of``.
    """
    kind = like.probe.is_reference
    return Null.of([profiles[o.name] for o in group if o.probe.is_reference is kind and o.name != like.name])


def profile_of(signals: Signals | None) -> np.ndarray:
    """``top_means`` of the map that decides; NaN where nothing was compared.

    What has risen counts as unchanged: how much a model forgets of other pictures says nothing of what it stores.
    """
    if signals is None or signals.decisive is None:
        return np.full(NUM_SIZES, np.nan)
    return top_means(signals.decisive.samples.double().mean(0).clamp(min=0).numpy())


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
    regions, labels = regions_of(observation, signals, references, config)
    evidence = evidence_of(observation, signals, regions, references)
    next_state, reason = judge(state, evidence, step, config.alerts, num_probes, planned)
    if not next_state.verdict.is_evidence and labels is not None:  # every map has a highest place; it needs evidence
        regions, labels = (), np.zeros_like(labels)
    news = is_alert(state, next_state, evidence)
    return Finding(observation, signals, evidence, next_state, reason, regions, labels, news)


def regions_of(
    observation: Observation, signals: Signals | None, references: References, config: MemWatchConfig
) -> tuple[tuple[Region, ...], np.ndarray | None]:
    """The regions of the deciding map with all their numbers, the one that decides first, and their labels ``(h, w)``.

    The one that decides exceeds the controls most; without controls it is the strongest.
    """
    if signals is None or signals.decisive is None or signals.deciding is None:
        return (), None
    rule, samples = config.regions, signals.decisive.samples.double().numpy()
    mean, levels = samples.mean(0), signals.deciding.mean
    scale = observation.image.shape[0] // mean.shape[0] if observation.image is not None else 1
    found = []
    for inside in components(mean, rule.min_factor, rule.relative, rule.min_area):
        effect, sem, low = estimate(samples, inside, rule.min_factor, rule.relative)
        level = observation.timesteps[int(levels[:, torch.from_numpy(inside)].mean(1).argmax())]
        own = float(mean[inside].mean())
        region = Region(box_of(inside, scale), float(inside.mean()), own, effect, sem, low, level=level)
        found.append((calibrated(region, size_index(int(inside.sum()), inside.size), references), inside))
    found.sort(key=lambda pair: pair[0].effect if pair[0].excess is None else pair[0].excess, reverse=True)
    labels = np.zeros(mean.shape, dtype=np.int32)
    for i, (_, inside) in enumerate(found, start=1):
        labels[inside] = i
    return tuple(region for region, _ in found), labels


def calibrated(region: Region, size: int, references: References) -> Region:
    """The region with what the controls and the peers say of it.

    Args:
        size: at which it is compared, see ``calibration.size_index``.
    """
    null, peers = references.controls, references.peers
    rank_p_peers = peers.rank_p(region.mean, size) if len(peers) else None
    if not null.is_enough:
        return replace(region, rank_p_peers=rank_p_peers)
    excess, rank_p = null.excess(region.mean, size), null.rank_p(region.mean, size)
    return replace(region, excess=excess, p=null.p_value(excess), rank_p=rank_p, rank_p_peers=rank_p_peers)


def evidence_of(
    observation: Observation, signals: Signals | None, regions: Sequence[Region], references: References
) -> Evidence:
    """The numbers of the region that decides; where there is none, those of nothing."""
    null, compared = references.controls, signals is None or signals.decisive is not None
    nothing = 1.0 if null.is_enough and compared and observation.finite else None
    evidence = Evidence(
        p=nothing,
        rank_p=nothing,
        num_controls=len(null),
        any_controls=references.any_controls,
        num_peers=len(references.peers),
        severity_peers=references.severity_peers,
        finite=observation.finite,
        compared=compared,
    )
    if not regions:
        return evidence
    r = regions[0]
    return replace(
        evidence,
        severity=factor(max(0.0, r.effect)),
        severity_low=factor(r.low),
        p=r.p,
        rank_p=r.rank_p,
        excess=r.excess,
        rank_p_peers=r.rank_p_peers,
    )


def capped(finding: Finding, audit: Audit, before: ProbeState) -> Finding:
    """The finding as it may be told after the audit.

    Suspicious at most where the audit contradicts the promise, unless it is far rarer than what contradicts, see
    ``Audit.largest_p``.

    Args:
        before: the probe's state before this event.
    """
    p = finding.evidence.p
    if finding.verdict is not Verdict.MEMORIZED or p is None or not audit.called or p <= audit.largest_p:
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
