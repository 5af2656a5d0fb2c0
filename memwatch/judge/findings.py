"""Findings: what the judge says of every observation of one event.

Maps -> regions -> calibration -> verdicts, as pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from memwatch.config import MemWatchConfig
from memwatch.judge.alerts import Evidence, ProbeState, Verdict, judge
from memwatch.judge.calibration import Null
from memwatch.judge.regions import Region, find_regions, threshold_of
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
        regions: largest first; none without evidence.
        labels: int ``(h, w)`` of the map: i inside ``regions[i - 1]``, 0 outside; ``None`` when nothing was compared.
        is_alert: whether this event is news: a worse verdict, or output that is no longer finite.
    """

    observation: Observation
    signals: Signals | None
    evidence: Evidence
    state: ProbeState
    reason: str
    regions: tuple[Region, ...]
    labels: np.ndarray | None
    is_alert: bool

    @property
    def name(self) -> str:
        return self.observation.name

    @property
    def verdict(self) -> Verdict:
        return self.state.verdict

    @property
    def severity(self) -> float:
        """The reduction factor of the strongest region; 1 when there is none."""
        return self.evidence.severity

    @property
    def p(self) -> float | None:
        """The p-value against the controls; ``None`` without controls."""
        return self.evidence.p


def judge_event(
    observations: Sequence[Observation], states: Mapping[str, ProbeState], step: int, config: MemWatchConfig
) -> tuple[list[Finding], dict[str, float], dict[str, ProbeState]]:
    """Judge all probes of one event.

    A probe is judged only against controls of its own kind (reference or prompt).

    Args:
        observations: of probes and controls.
        states: by probe, its state before this event.

    Returns:
        The findings of all probes; by name the statistics of the finite controls; the probes' next states.
    """
    all_signals = {o.name: signals_of(o, config) for o in observations}
    controls = {o.name: statistic(all_signals[o.name]) for o in observations if o.probe.is_control}
    controls = {name: x for name, x in controls.items() if math.isfinite(x)}
    nulls = {
        kind: Null.of(controls[o.name] for o in observations if o.name in controls and o.probe.is_reference is kind)
        for kind in (True, False)
    }
    findings = [
        judge_probe(o, all_signals[o.name], nulls[o.probe.is_reference], states.get(o.name, ProbeState()), step, config)
        for o in observations
        if not o.probe.is_control
    ]
    return findings, controls, {**states, **{finding.name: finding.state for finding in findings}}


def signals_of(observation: Observation, config: MemWatchConfig) -> Signals | None:
    """Every signal, or ``None`` where the measurements are not finite."""
    if not observation.finite:
        return None
    s = config.signals
    return compute_signals(observation, terms=s.terms, against=s.against, combine=s.combine, smooth=s.smooth)


def statistic(signals: Signals | None) -> float:
    """The largest log factor of the deciding map, hence over all regions; NaN where nothing was compared."""
    if signals is None or signals.decisive is None:
        return math.nan
    return float(signals.decisive.mean.max())


def judge_probe(
    observation: Observation, signals: Signals | None, null: Null, state: ProbeState, step: int, config: MemWatchConfig
) -> Finding:
    """One probe's finding.

    Args:
        null: the distribution of the controls of its kind.
        state: the probe's state before this event.
    """
    regions, labels = regions_of(observation, signals, config)
    strongest = max(regions, key=lambda region: region.mean, default=None)
    x = statistic(signals)
    evidence = Evidence(
        severity=factor(strongest.mean) if strongest else 1.0,
        severity_low=factor(strongest.mean - 2 * strongest.sem) if strongest else 1.0,
        statistic=x,
        p=null.p_value(x) if math.isfinite(x) else None,
        smallest_p=null.smallest_p,
        finite=observation.finite,
        compared=signals is None or signals.decisive is not None,
    )
    next_state, reason = judge(state, evidence, step, config.alerts)
    if not next_state.verdict.is_evidence and labels is not None:  # every map has a highest place; it needs evidence
        regions, labels = (), np.zeros_like(labels)
    if signals is not None and labels is not None:
        regions = tuple(explained(r, labels == i, signals, observation, null) for i, r in enumerate(regions, start=1))
    return Finding(
        observation, signals, evidence, next_state, reason, regions, labels, is_alert(state, next_state, evidence)
    )


def regions_of(
    observation: Observation, signals: Signals | None, config: MemWatchConfig
) -> tuple[tuple[Region, ...], np.ndarray | None]:
    """The regions of the deciding map and their labels, see ``find_regions``; none where nothing was compared."""
    if signals is None or signals.decisive is None:
        return (), None
    image, rule, decisive = observation.image, config.regions, signals.decisive
    scale = image.shape[0] // decisive.samples.shape[-2] if image is not None else 1
    threshold = threshold_of(decisive.mean.numpy(), rule.min_factor, rule.relative)
    return find_regions(decisive, threshold, min_area=rule.min_area, scale=scale)


def explained(region: Region, inside: np.ndarray, signals: Signals, observation: Observation, null: Null) -> Region:
    """The region, with its own p-value and the timestep at which it is strongest."""
    assert signals.deciding is not None
    level = int(signals.deciding.mean[:, torch.from_numpy(inside)].mean(1).argmax())
    return replace(region, p=null.p_value(region.peak), level=observation.timesteps[level])


def is_alert(before: ProbeState, after: ProbeState, evidence: Evidence) -> bool:
    """Whether this event is news: evidence that was not there before, or output that is no longer finite."""
    if not evidence.finite:
        return before.finite
    return after.verdict.is_evidence and after.verdict is not before.verdict
