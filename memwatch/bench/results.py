"""What one method, or memwatch as it is configured, did on one finished run: maps, scores, regions and first alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from memwatch.bench.items import SIZE, Item, Kind
from memwatch.bench.methods import Method
from memwatch.bench.metrics import auc, resized
from memwatch.bench.protocol import CURVATURE
from memwatch.bench.runs import Finished
from memwatch.config import LevelsConfig, MemWatchConfig
from memwatch.judge.alerts import ProbeState, Verdict
from memwatch.judge.audit import Audit
from memwatch.judge.findings import Finding, Judgement, judge_event
from memwatch.judge.screen import chosen
from memwatch.measure.measurement import Measurement, Observation

PATIENCE = 2


@dataclass
class RunResult:
    """What one method did on one run.

    Attributes:
        maps: of planted items at the last event, at the masks' size.
        predicted: fixed-threshold regions of planted items, bool ``(SIZE, SIZE)``; filled in when a threshold is known.
        scores: of every item at the last event.
        first_alert: by item, the step of the first alert.
        events: of memwatch itself, by step, everything that it said.
    """

    run: Finished
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    predicted: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    first_alert: dict[str, int] = field(default_factory=dict)
    events: dict[int, Judgement] = field(default_factory=dict)

    @cached_property
    def pixel_auroc(self) -> dict[str, float]:
        """Of every stored template: probability that a pixel inside the mask exceeds one outside."""
        return {i.name: auc(self.maps[i.name][i.mask], self.maps[i.name][~i.mask]) for i in self.templates}

    @property
    def audit(self) -> Audit:
        """Of memwatch itself, at the last event."""
        return self.events[self.run.steps[-1]].audit

    @property
    def templates(self) -> list[Item]:
        """Stored ones that have a map."""
        return [item for item in self.run.stored if item.kind is Kind.TEMPLATE and item.name in self.maps]

    @property
    def localizable(self) -> list[Item]:
        """Stored items with a map whose mask is a part of the picture."""
        return [item for item in self.run.stored if not item.mask.all() and item.name in self.maps]

    def precedes(self, item: Item) -> bool:
        """Whether an item's first alert came before its first visible copy."""
        alert, copy = self.first_alert.get(item.name), self.run.first_copy(item)
        return alert is not None and copy is not None and alert < copy


def run_method(method: Method, run: Finished) -> RunResult:
    """Maps and scores at the last event, and alerts by one rule for all methods: above the bar twice in a row."""
    last = run.steps[-1]
    found = method.maps(run, last)
    result = RunResult(run, {i.name: resized(found[i.name], (SIZE, SIZE)) for i in run.planted if i.name in found})
    streak: dict[str, int] = {}
    for step in [last] if method.only_last else run.steps[1:]:
        result.scores = scores = method.scores(run, step)  # the last event's stay
        if not scores:
            continue
        bar = method.bar(run, scores)
        for name, score in scores.items():
            streak[name] = streak.get(name, 0) + 1 if score > bar else 0
            if streak[name] >= PATIENCE:
                result.first_alert.setdefault(name, step)
    return result


def run_product(config: MemWatchConfig, run: Finished) -> RunResult:
    """memwatch itself as configured: its own screen, regions, controls, verdicts and patience, on what was measured.

    Raises:
        ValueError: the benchmark did not measure what the configuration asks for.
    """
    check_measured(config, run.world.levels)
    sizes = (config.levels.draws, config.levels.timesteps, config.signals.unconditional)
    result = RunResult(run)
    states: Mapping[str, ProbeState] = {}
    judgement = Judgement()
    for number, step in enumerate(run.steps[1:], start=1):
        observations = []
        for item in run.items:
            last_clean = states.get(item.name, ProbeState()).last_clean
            earlier = run.earlier_step(config.signals, step, last_clean)
            observations.append(run.observation(item.name, step, earlier, *sizes))
        if not config.is_full_event(number):
            observations = screened(observations, config)
        judgement = judge_event(observations, states, step, config)
        states = judgement.states
        for f in judgement.findings:
            if f.verdict is Verdict.MEMORIZED:
                result.first_alert.setdefault(f.name, step)
        judged = (*judgement.findings, *judgement.controls)
        result.scores = {f.name: f.evidence.excess or 0.0 for f in judged}
        result.events[step] = judgement
    planted = {item.name for item in run.planted}
    for f in judgement.findings:
        if f.name in planted:
            keep_map(result, f)
    return result


def screened(observations: Sequence[Observation], config: MemWatchConfig) -> list[Observation]:
    """What a screened event leaves of observations that were measured in full."""
    seen = [forward_only(o, config.levels.screen_draws) for o in observations]
    names = chosen(seen, config)
    return [o if o.name in names else s for o, s in zip(observations, seen, strict=True)]


def forward_only(o: Observation, draws: int) -> Observation:
    """The observation as the screen makes it: the first noise draws, without retained variances."""

    def seen(m: Measurement | None) -> Measurement | None:
        return None if m is None else Measurement(None, m.epsilon[:, :draws])

    return replace(
        o,
        now=Measurement(None, o.now.epsilon[:, :draws]),
        unconditional=seen(o.unconditional),
        baseline=seen(o.baseline),
        unconditional_baseline=seen(o.unconditional_baseline),
        eps=None if o.eps is None else o.eps[:, :draws],
    )


def keep_map(result: RunResult, finding: Finding) -> None:
    """The deciding map and its regions, at the masks' size."""
    signals, labels = finding.signals, finding.labels
    if signals is not None and signals.decisive is not None and labels is not None:
        result.maps[finding.name] = resized(signals.decisive.mean.double().numpy(), (SIZE, SIZE))
        result.predicted[finding.name] = np.kron(labels > 0, np.ones((SIZE // len(labels),) * 2, dtype=bool))


def check_measured(config: MemWatchConfig, measured: LevelsConfig) -> None:
    """Whether the benchmark measured as ``config`` asks.

    Raises:
        ValueError: its levels, draws, vectors or tile were not measured.
    """
    levels, curvature = config.levels, config.curvature
    known = set(levels.timesteps) <= set(measured.timesteps) and levels.draws <= measured.draws
    if not known or (curvature.vectors, curvature.tile) != (CURVATURE.vectors, CURVATURE.tile):
        raise ValueError(
            f"the benchmark measured timesteps {measured.timesteps}, up to {measured.draws} draws of "
            f"{CURVATURE.vectors} vectors in tiles of {CURVATURE.tile}; the configuration asks for "
            f"{levels.timesteps}, {levels.draws}, {curvature.vectors}, {curvature.tile}"
        )


def leave_one_out(results: Sequence[RunResult]) -> None:
    """Regions of every run at the threshold that is best on the *other* runs (pooled IoU); none with a single run."""
    values = np.concatenate([np.zeros(1), *(m.ravel() for r in results for m in r.maps.values())])
    candidates = np.unique(np.quantile(values, np.linspace(0, 1, 101)))
    overlaps = {id(r): np.array([_counts(r, t) for t in candidates]).sum(1) for r in results}  # (thresholds, 2)
    for r in results:
        others = [overlaps[id(o)] for o in results if o is not r and o.maps]
        if others and r.maps:
            intersection, union = sum(others).T  # type: ignore[union-attr]
            best = float(candidates[np.argmax(intersection / np.maximum(union, 1))])
            r.predicted = {name: m >= best for name, m in r.maps.items()}


def _counts(result: RunResult, threshold: float) -> np.ndarray:
    """Intersection and union of every localizable stored item: ``(items, 2)``."""
    pairs = [(result.maps[i.name] >= threshold, i.mask) for i in result.localizable]
    return np.array([((p & m).sum(), (p | m).sum()) for p, m in pairs] or [(0, 0)])
