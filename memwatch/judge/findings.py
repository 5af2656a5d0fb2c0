"""Findings: what the judge says of every observation of one event, by pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memwatch.config import MemWatchConfig
from memwatch.judge.copied import Proof
from memwatch.judge.statistic import (
    SIXTEENTH,
    UNKNOWN_EVENTS,
    Compared,
    Screened,
    called_from,
    compare,
    kind_of,
    p_value,
    threshold,
    top_means,
)
from memwatch.judge.verdict import LASTING, Evidence, ProbeState, Verdict, is_alert, judge
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.measure.regions import Region, regions_of
from memwatch.measure.signals import Signals, factor


@dataclass(frozen=True)
class Finding:
    """One probe at one event.

    Attributes:
        observation, signals: what was measured, and its maps; ``None`` where not all of it is finite.
        evidence: the numbers that the verdict rests on. state: after this event; it holds the verdict.
        reason: why the verdict is what it is, in words.
        regions: the strongest first; none without evidence.
        labels: int ``(h, w)`` of the map: i inside ``regions[i - 1]``, 0 outside; ``None`` when nothing was compared.
        is_alert: whether this event is news: a worse verdict, or output that is no longer finite.
        proof: what the caption generates; ``None`` where nothing was generated, see ``memwatch.proof.prove``.
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
        """See ``Evidence``."""
        return self.evidence.severity

    @property
    def p(self) -> float | None:
        """The p-value against the controls; ``None`` without enough of them."""
        return self.evidence.p


@dataclass(frozen=True)
class Standing:
    """How the controls of one kind have scored.

    Attributes:
        number: of those with a score. highest: the largest score of one of them so far.
        called_from: the mean score of three events from which on a probe may be called memorized.
    """

    number: int
    highest: float
    called_from: float

    def __str__(self) -> str:
        called = f"memorized is called from a mean of {self.called_from:.1f} on"
        return f"{self.number} controls scored {self.highest:.1f} at most so far, and {called}"


@dataclass(frozen=True)
class Judgement:
    """Everything that the judge says of one event.

    Attributes:
        findings: of the watched probes, in their order. controls: of the controls, each judged by the others.
        states: by name, of all of them after this event.
        standings: by kind of probe, of which there are enough controls.
        num_rotated: rows that were rotated in; only those with evidence or news are findings.
        num_measured: probes and controls that were measured with curvature.
    """

    findings: tuple[Finding, ...] = ()
    controls: tuple[Finding, ...] = ()
    states: Mapping[str, ProbeState] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)
    num_rotated: int = 0
    num_measured: int = 0

    @property
    def standing(self) -> str:
        """How the controls have scored, in words; empty where there are too few of them."""
        of_kinds = [f"{kind} probes: {standing}" for kind, standing in self.standings.items()]
        return "; ".join(of_kinds if len(of_kinds) > 1 else map(str, self.standings.values()))

    @property
    def everything(self) -> tuple[Finding, ...]:
        """Of probes and controls."""
        return (*self.findings, *self.controls)


def judge_event(
    observations: Sequence[Observation],
    states: Mapping[str, ProbeState],
    step: int,
    config: MemWatchConfig,
    looks: int | None = None,
    screened: Screened | None = None,
) -> Judgement:
    """Judge all probes of one event, and every control by the others.

    Args:
        observations: of probes and controls, with curvature where it was measured.
        states: by name, of before this event.
        looks: how many verdicts the run may give; default: of these probes at 100 events.
        screened: what the screen measured and chose; without it everything is judged by ``observations``.
    """
    controls = [o for o in observations if o.probe.is_control]
    watched = [o for o in observations if not o.probe.is_control]
    memorized_p = threshold(config.alerts.false_alarms_per_run, looks or UNKNOWN_EVENTS * len(watched))
    measured = observations if screened is None else [o for o in observations if o.has_curvature]
    by_terms = compare(measured, config.signals)
    by_loss = {} if screened is None else compare(screened.observations, config.signals, terms="loss")
    scored = by_loss | by_terms  # a control's score is of all draws where they were measured, else of the screen
    highest = {o.name: highest_of(scored[o.name], states) for o in controls if o.name in scored}
    standings = standings_of(controls, highest, memorized_p)
    compared = by_terms if screened is None else by_loss | {name: by_terms[name] for name in screened.chosen}

    def finding(o: Observation) -> Finding:
        its, before = compared[o.name], states.get(o.name, ProbeState())
        regions, labels = regions_of(its.observation, its.signals)
        evidence = evidence_of(its, before, bool(controls))
        state, reason = judge(before, evidence, step, config.alerts.max_p, memorized_p)
        state = replace(state, highest=highest.get(o.name))
        if not state.verdict.is_evidence and labels is not None:  # every map has a highest place; a box takes evidence
            regions, labels = (), np.zeros_like(labels)
        return Finding(its.observation, its.signals, evidence, state, reason, regions, labels, is_alert(before, state))

    findings, judged_controls = tuple(map(finding, watched)), tuple(map(finding, controls))
    new_states = {**states} | {f.name: f.state for f in (*findings, *judged_controls)}
    told = tuple(f for f in findings if not f.observation.probe.in_rotation or f.is_worth_a_look)
    rotated, num_measured = sum(o.probe.in_rotation for o in watched), sum(o.has_curvature for o in observations)
    return Judgement(told, judged_controls, new_states, standings, rotated, num_measured)


def highest_of(compared: Compared, states: Mapping[str, ProbeState]) -> float | None:
    """The largest score of a control so far, this event's included; ``None`` where it never had one."""
    before = states.get(compared.observation.name, ProbeState()).highest
    return max((score for score in (before, compared.score) if score is not None), default=None)


def standings_of(
    controls: Sequence[Observation], highest: Mapping[str, float | None], memorized_p: float
) -> dict[str, Standing]:
    """How the controls of each kind stand, where there are enough of them. ``highest``: see ``highest_of``."""
    standings = {}
    for kind in dict.fromkeys(kind_of(o.probe) for o in controls):
        known = [score for o in controls if kind_of(o.probe) == kind and (score := highest.get(o.name)) is not None]
        if len(known) >= MIN_CONTROLS:
            standings[kind] = Standing(len(known), max(known), called_from(memorized_p, len(known)))
    return standings


def evidence_of(compared: Compared, before: ProbeState, any_controls: bool) -> Evidence:
    """The numbers of one probe.

    Args:
        before: its state after the last event. any_controls: whether there are any of either kind.
    """
    score, num_controls, signals = compared.score, compared.num_controls, compared.signals
    fallen = None if signals is None or signals.fallen is None else signals.fallen.mean.double().numpy()
    p = lasting = None
    if score is not None:
        mean = (score + sum(before.scores[: LASTING - 1])) / LASTING
        p, lasting = map(float, p_value(np.array([score, mean]), num_controls))
    return Evidence(
        severity=1.0 if fallen is None else factor(max(0.0, float(top_means(fallen)[SIXTEENTH]))),
        p=p,
        z_score=score,
        lasting_p=lasting,
        num_controls=num_controls,
        any_controls=any_controls,
        finite=signals is not None,
        compared=signals is None or signals.decisive is not None,
    )
