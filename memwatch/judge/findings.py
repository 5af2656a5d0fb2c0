"""From what was measured at one event to findings: maps, regions, calibration, verdicts. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memwatch.alerts import Evidence, ProbeState, judge
from memwatch.calibration import Null
from memwatch.config import MemWatchConfig
from memwatch.regions import Region, find_regions, threshold_of
from memwatch.report import Finding
from memwatch.signals import Measurement, Signals, compute_signals, factor


@dataclass(frozen=True)
class Look:
    """Everything measured on one probe at one event.

    Attributes:
        now, null: the current model, conditional and unconditional (``None`` where not looked at).
        baseline: what it is compared with; ``None`` when there is nothing earlier.
        baseline_step: its step, where it has one.
        eps: true noise of a reference probe.
        image: RGB uint8 to show.
    """

    name: str
    prompt: str
    is_reference: bool
    is_control: bool
    timesteps: tuple[float, ...]
    now: Measurement
    null: Measurement | None
    baseline: Measurement | None
    baseline_step: int | None
    eps: Tensor | None
    image: np.ndarray | None

    @property
    def finite(self) -> bool:
        return all(m.finite for m in (self.now, self.null, self.baseline) if m is not None)


def signals_of(look: Look, config: MemWatchConfig) -> Signals | None:
    """Every signal, or ``None`` where the measurements are not finite."""
    if not look.finite:
        return None
    s = config.signals
    return compute_signals(
        look.now, look.baseline, look.null, look.eps, decide=s.decide, combine=s.combine, smooth=s.smooth
    )


def statistic(signals: Signals | None) -> float:
    """Largest log factor over levels and pixels, hence over regions; NaN where nothing was compared."""
    if signals is None or signals.decisive is None:
        return math.nan
    return float(signals.decisive.mean.max())


def judge_event(
    looks: Sequence[Look], states: Mapping[str, ProbeState], step: int, config: MemWatchConfig
) -> tuple[list[Finding], dict[str, float], dict[str, ProbeState]]:
    """Findings of all probes, statistics of the finite controls, and the probes' next states.

    A probe is judged against controls of its own kind (reference or prompt) only.
    """
    all_signals = {look.name: signals_of(look, config) for look in looks}
    controls = {look.name: statistic(all_signals[look.name]) for look in looks if look.is_control}
    controls = {name: x for name, x in controls.items() if math.isfinite(x)}
    nulls = {}
    for kind in (True, False):
        nulls[kind] = Null.of(
            controls[look.name] for look in looks if look.name in controls and look.is_reference is kind
        )
    findings, next_states = [], dict(states)
    for look in looks:
        if not look.is_control:
            state = states.get(look.name, ProbeState())
            finding, next_states[look.name] = judge_probe(
                look, all_signals[look.name], nulls[look.is_reference], state, step, config
            )
            findings.append(finding)
    return findings, controls, next_states


def judge_probe(
    look: Look, signals: Signals | None, null: Null, state: ProbeState, step: int, config: MemWatchConfig
) -> tuple[Finding, ProbeState]:
    regions: tuple[Region, ...] = ()
    labels: np.ndarray | None = None
    if signals is not None and signals.decisive is not None:
        scale = look.image.shape[0] // signals.decisive.samples.shape[-2] if look.image is not None else 1
        rule = config.regions
        threshold = threshold_of(signals.decisive.mean.numpy(), rule.min_factor, rule.relative)
        regions, labels = find_regions(signals.decisive, threshold, min_area=rule.min_area, scale=scale)
    strongest = max(regions, key=lambda region: region.mean, default=None)
    x = statistic(signals)
    evidence = Evidence(
        severity=factor(strongest.mean) if strongest else 1.0,
        severity_low=factor(strongest.mean - 2 * strongest.sem) if strongest else 1.0,
        p=null.p_value(x) if math.isfinite(x) else None,
        smallest_p=null.smallest_p,
        finite=look.finite,
        compared=signals is None or signals.decisive is not None,
    )
    next_state, reason = judge(state, evidence, step, config.alerts)
    if not next_state.verdict.is_evidence and labels is not None:
        regions, labels = (
            (),
            np.zeros_like(labels),
        )  # every map has a highest place; it is a region only where there is evidence
    levels: tuple[float, ...] = ()
    if signals is not None and labels is not None:
        levels = tuple(strongest_level(signals, labels == i, look.timesteps) for i in range(1, len(regions) + 1))
    finding = Finding(
        name=look.name,
        prompt=look.prompt,
        is_reference=look.is_reference,
        verdict=next_state.verdict,
        reason=reason,
        severity=evidence.severity,
        severity_low=evidence.severity_low,
        p=evidence.p,
        statistic=x,
        baseline_step=look.baseline_step,
        since=next_state.since,
        regions=regions,
        region_p=tuple(null.p_value(region.peak) for region in regions),
        region_level=levels,
        labels=labels,
        timesteps=look.timesteps,
        image=look.image,
        signals=signals,
        is_new=is_worse(state, next_state, evidence),
    )
    return finding, next_state


def is_worse(before: ProbeState, after: ProbeState, evidence: Evidence) -> bool:
    """Whether this event is news: a verdict that was not there before, or output that is no longer finite."""
    return after.verdict is not before.verdict if evidence.finite else before.finite


def strongest_level(signals: Signals, inside: np.ndarray, timesteps: Sequence[float]) -> float:
    """The timestep at which the deciding signal is largest inside a region."""
    assert signals.deciding is not None
    return timesteps[int(signals.deciding.mean[:, torch.from_numpy(inside)].mean(1).argmax())]
