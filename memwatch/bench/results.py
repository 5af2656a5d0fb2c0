"""What one method, or memwatch as it is configured, did on one finished run: maps, scores, regions and first alerts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from memwatch.alerts import ProbeState, Verdict
from memwatch.bench.items import SIZE, Item, Kind
from memwatch.bench.look import CURVATURE, LEVELS, NULL_DRAWS
from memwatch.bench.methods import Method, bar_of, baseline_step, maps_of, scores_of
from memwatch.bench.runs import Finished
from memwatch.config import MemWatchConfig
from memwatch.curvature import CurvatureMap
from memwatch.evaluation import auc, resized
from memwatch.judging import Look, judge_event
from memwatch.signals import Measurement

PATIENCE = 2


@dataclass
class RunResult:
    """What one method did on one run.

    Attributes:
        maps: of planted items at the last event, at the masks' size.
        predicted: fixed-threshold regions of planted items, bool ``(SIZE, SIZE)``; filled in when a threshold is known.
        scores: of every item at the last event.
        first_alert: by item, the step of the first alert.
    """

    run: Finished
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    predicted: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    first_alert: dict[str, int] = field(default_factory=dict)

    @cached_property
    def pixel_auroc(self) -> dict[str, float]:
        """Of every stored template: probability that a pixel inside the mask exceeds one outside."""
        return {i.name: auc(self.maps[i.name][i.mask], self.maps[i.name][~i.mask]) for i in self.templates}

    @property
    def templates(self) -> list[Item]:
        return [item for item in self.run.stored if is_template(item) and item.name in self.maps]

    @property
    def localizable(self) -> list[Item]:
        """Stored items whose mask is a part of the picture."""
        return [item for item in self.run.stored if not item.mask.all()]


def run_method(method: Method, run: Finished) -> RunResult:
    """Maps and scores at the last event, and alerts by the rule that all methods share: above every control, twice in a row."""
    last = run.steps[-1]
    found = maps_of(method, run, last)
    maps = {i.name: resized(found[i.name], (SIZE, SIZE)) for i in run.planted if i.name in found}
    result = RunResult(run, maps)
    streak: dict[str, int] = {}
    for step in [last] if method.only_last else run.steps[1:]:
        result.scores = scores = scores_of(method, run, step)  # the last event's stay
        bar = bar_of(method, run, scores)
        for item in run.items:
            streak[item.name] = streak.get(item.name, 0) + 1 if scores[item.name] > bar else 0
            if streak[item.name] >= PATIENCE:
                result.first_alert.setdefault(item.name, step)
    return result


def run_product(config: MemWatchConfig, run: Finished) -> RunResult:
    """memwatch itself as configured: its own regions, controls, verdicts and patience, on what the run measured."""
    result = RunResult(run)
    states: dict[str, ProbeState] = {}
    planted = {item.name for item in run.planted}
    method = Method(
        "memwatch", config.signals.decide, config.signals.baseline, config.signals.combine, config.levels.draws
    )
    for step in run.steps[1:]:
        looks = [_look(config, run, item, step, baseline_step(method, run, step)) for item in run.items]
        findings, controls, states = judge_event(looks, states, step, config)
        for f in findings:
            if f.verdict is Verdict.MEMORIZED:
                result.first_alert.setdefault(f.name, step)
        if step == run.steps[-1]:
            result.scores = {f.name: f.statistic for f in findings} | controls
            for f in findings:
                if (
                    f.name in planted
                    and f.labels is not None
                    and f.signals is not None
                    and f.signals.decisive is not None
                ):
                    result.maps[f.name] = resized(f.signals.decisive.mean.double().numpy(), (SIZE, SIZE))
                    result.predicted[f.name] = np.kron(f.labels > 0, np.ones((SIZE // len(f.labels),) * 2, dtype=bool))
    return result


def _look(config: MemWatchConfig, run: Finished, item: Item, step: int, earlier: int) -> Look:
    chosen = [LEVELS.timesteps.index(t) for t in config.levels.timesteps]
    draws = config.levels.draws

    def taken(name: str, step: int, draws: int = draws) -> Measurement:
        m = run.measurement(name, step).first(draws)
        return Measurement(CurvatureMap(m.rho.samples[chosen]), m.epsilon[chosen])

    eps = run.true_noise(item.name)[chosen][:, :draws]
    image = np.asarray(item.probe)
    null = taken(f"null/{item.name}", step, config.null_draws) if config.signals.unconditional else None
    return Look(
        item.name,
        item.caption,
        True,
        item.kind is Kind.CONTROL,
        config.levels.timesteps,
        taken(item.name, step),
        null,
        taken(item.name, earlier),
        earlier,
        eps,
        image,
    )


def check_measured(config: MemWatchConfig) -> None:
    """Whether the benchmark measured as ``config`` asks.

    Raises:
        ValueError: its levels, draws, vectors or tile were not measured.
    """
    levels, curvature = config.levels, config.curvature
    ok = (
        set(levels.timesteps) <= set(LEVELS.timesteps)
        and levels.draws <= LEVELS.draws
        and config.null_draws <= NULL_DRAWS
    )
    if not ok or (curvature.vectors, curvature.tile) != (CURVATURE.vectors, CURVATURE.tile):
        raise ValueError(
            f"the benchmark measured timesteps {LEVELS.timesteps}, up to {LEVELS.draws} draws ({NULL_DRAWS} of the unconditional branch) of "
            f"{CURVATURE.vectors} vectors in tiles of {CURVATURE.tile}; the configuration asks for {levels.timesteps}, {levels.draws} "
            f"({config.null_draws}), {curvature.vectors}, {curvature.tile}"
        )


def leave_one_out(results: Sequence[RunResult]) -> None:
    """Regions of every run at the threshold that is best on the *other* runs (pooled IoU); nothing with a single run."""
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
    pairs = [(result.maps[i.name] >= threshold, i.mask) for i in result.localizable if i.name in result.maps]
    return np.array([((p & m).sum(), (p | m).sum()) for p, m in pairs] or [(0, 0)])


def is_template(item: Item) -> bool:
    return item.kind is Kind.TEMPLATE
