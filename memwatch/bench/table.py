"""The comparison: every method on the same checkpoints, against exact masks and measured copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from memwatch.alerts import ProbeState, Verdict
from memwatch.bench.items import PLANTED, SIZE, Item, Kind
from memwatch.bench.look import CURVATURE, LEVELS
from memwatch.bench.methods import Method, all_methods, baseline_step, maps_of, scores_of
from memwatch.bench.runs import Finished
from memwatch.config import MemWatchConfig
from memwatch.curvature import CurvatureMap
from memwatch.evaluation import auc, best_of_thresholds, resized, tpr_at_fpr
from memwatch.judging import Look, judge_event
from memwatch.signals import Measurement

NEGATIVES = (Kind.HELD_OUT, Kind.LEARNED, Kind.CONSTRAINED)
PATIENCE = 2


@dataclass
class RunResult:
    """What one method did on one run.

    Attributes:
        maps: of stored items at the last event, at the masks' size.
        predicted: fixed-threshold regions of stored items, bool ``(SIZE, SIZE)``; filled in when a threshold is known.
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
    stored = {item.name for item in run.stored}
    maps = {name: resized(values, (SIZE, SIZE)) for name, values in maps_of(method, run, last).items() if name in stored}
    result = RunResult(run, maps)
    streak: dict[str, int] = {}
    for step in [last] if method.only_last else run.steps[1:]:
        result.scores = scores = scores_of(method, run, step)  # the last event's stay
        bar = max(scores[item.name] for item in run.of_kind(Kind.CONTROL))
        for item in run.items:
            streak[item.name] = streak.get(item.name, 0) + 1 if scores[item.name] > bar else 0
            if streak[item.name] >= PATIENCE:
                result.first_alert.setdefault(item.name, step)
    return result


def run_product(config: MemWatchConfig, run: Finished) -> RunResult:
    """memwatch itself as configured: its own regions, controls, verdicts and patience, on what the run measured."""
    result = RunResult(run)
    states: dict[str, ProbeState] = {}
    stored = {item.name for item in run.stored}
    method = Method("memwatch", config.signals.decide, config.signals.baseline, config.signals.combine, config.levels.draws)
    for step in run.steps[1:]:
        looks = [_look(config, run, item, step, baseline_step(method, run, step)) for item in run.items]
        findings, controls, states = judge_event(looks, states, step, config)
        for f in findings:
            if f.verdict is Verdict.MEMORIZED:
                result.first_alert.setdefault(f.name, step)
        if step == run.steps[-1]:
            result.scores = {f.name: f.statistic for f in findings} | controls
            for f in findings:
                if f.name in stored and f.labels is not None and f.signals is not None and f.signals.decisive is not None:
                    result.maps[f.name] = resized(f.signals.decisive.mean.double().numpy(), (SIZE, SIZE))
                    result.predicted[f.name] = np.kron(f.labels > 0, np.ones((SIZE // len(f.labels),) * 2, dtype=bool))
    return result


def _look(config: MemWatchConfig, run: Finished, item: Item, step: int, earlier: int) -> Look:
    chosen = [LEVELS.timesteps.index(t) for t in config.levels.timesteps]
    draws = config.levels.draws

    def taken(m: Measurement) -> Measurement:
        return Measurement(CurvatureMap(m.rho.samples[chosen][:, :draws]), m.epsilon[chosen][:, :draws])

    eps = run.true_noise(item.name)[chosen][:, :draws]
    image = np.asarray(item.probe)
    return Look(
        item.name, item.caption, True, item.kind is Kind.CONTROL, config.levels.timesteps, taken(run.measurement(item.name, step)), None,
        taken(run.measurement(item.name, earlier)), earlier, eps, image,
    )  # fmt: skip


def measured_config(config: MemWatchConfig) -> MemWatchConfig:
    """``config`` where the benchmark measured as it asks.

    Raises:
        ValueError: its levels, draws, vectors or tile were not measured.
    """
    levels, curvature = config.levels, config.curvature
    ok = set(levels.timesteps) <= set(LEVELS.timesteps) and levels.draws <= LEVELS.draws
    if not ok or (curvature.vectors, curvature.tile) != (CURVATURE.vectors, CURVATURE.tile):
        raise ValueError(
            f"the benchmark measured timesteps {LEVELS.timesteps}, up to {LEVELS.draws} draws of {CURVATURE.vectors} vectors in tiles of "
            f"{CURVATURE.tile}; the configuration asks for {levels.timesteps}, {levels.draws}, {curvature.vectors}, {curvature.tile}"
        )
    return replace(config, signals=replace(config.signals, unconditional=False))


# --- one row ---------------------------------------------------------------------------------------------------------------------------


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


def iou_of(results: Sequence[RunResult], chosen: Callable[[Item], bool]) -> float | None:
    """Pooled over the chosen stored items."""
    pairs = [(r.predicted[i.name], i.mask) for r in results for i in r.run.stored if chosen(i) and i.name in r.predicted]
    union = sum((p | m).sum() for p, m in pairs)
    return float(sum((p & m).sum() for p, m in pairs) / union) if union else None


def is_template(item: Item) -> bool:
    return item.kind is Kind.TEMPLATE


def is_logo(item: Item) -> bool:
    return item.kind is Kind.LOGO


def row_of(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """One line of ``bench.json``, but for the oracle."""
    pixel = [value for r in results for value in r.pixel_auroc.values()]
    positives = [r.scores[i.name] for r in results for i in r.run.stored]
    negatives = {kind: [r.scores[i.name] for r in results for i in r.run.of_kind(kind)] for kind in NEGATIVES}
    held_out = negatives[Kind.HELD_OUT]
    known = bool(positives) and bool(held_out)
    alerts = any(r.first_alert for r in results) or not method.only_last
    row = {
        "method": method.method, "signal": method.signal, "baseline": method.baseline, "level": method.level, "draws": method.draws,
        "iou_fixed": iou_of(results, is_template), "iou_oracle": None, "pixel_auroc": float(np.mean(pixel)) if pixel else None,
        "iou_fixed_logo": iou_of(results, is_logo), "iou_fixed_verbatim": iou_of(results, lambda i: i.kind is Kind.VERBATIM),
        "auc_heldout": auc(positives, held_out) if known else None,
        "tpr1_heldout": tpr_at_fpr(positives, held_out, 0.01) if known else None,
        "tpr5_heldout": tpr_at_fpr(positives, held_out, 0.05) if known else None,
        "auc_learned": auc(positives, negatives[Kind.LEARNED]) if known else None,
        "auc_constrained": auc(positives, negatives[Kind.CONSTRAINED]) if known else None,
        "called_stored": called(results, lambda i, r: i.name in {s.name for s in r.run.stored}) if alerts else None,
        "called_learned": called(results, lambda i, _: i.kind is Kind.LEARNED) if alerts else None,
        "called_constrained": called(results, lambda i, _: i.kind is Kind.CONSTRAINED) if alerts else None,
        "called_heldout": called(results, lambda i, _: i.kind is Kind.HELD_OUT) if alerts else None,
    }  # fmt: skip
    return row | lead_of(results, alerts) | {"runs": len(results)}


def called(results: Sequence[RunResult], chosen: Callable[[Item, RunResult], bool]) -> float | None:
    """Share of the chosen items with an alert at any event."""
    hits = [item.name in r.first_alert for r in results for item in r.run.items if chosen(item, r)]
    return float(np.mean(hits)) if hits else None


def lead_of(results: Sequence[RunResult], alerts: bool) -> dict[str, float | None]:
    """How the first alert stands to the first visible copy, over stored items: share that it precedes, and by how many events and showings."""
    if not alerts:
        return {"lead_fraction": None, "lead_exposures": None, "lead_events": None}
    before, exposures, events = [], [], []
    for r in results:
        for item in r.run.stored:
            alert, copy = r.first_alert.get(item.name), r.run.first_copy(item)
            before.append(alert is not None and copy is not None and alert < copy)
            if alert is not None and copy is not None:
                exposures.append(r.run.exposures(item, copy) - r.run.exposures(item, alert))
                events.append(r.run.steps.index(copy) - r.run.steps.index(alert))
    return {
        "lead_fraction": float(np.mean(before)) if before else None,
        "lead_exposures": float(np.median(exposures)) if exposures else None,
        "lead_events": float(np.median(events)) if events else None,
    }


INTERVALS = ("iou_fixed", "pixel_auroc", "auc_heldout", "tpr1_heldout", "called_learned", "called_heldout", "lead_fraction")


def full_row(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """A row with the published oracle, which is the best of 101 thresholds over all runs' stored templates."""
    pairs = [(r.maps[i.name], i.mask) for r in results for i in r.templates]
    oracle = best_of_thresholds(np.stack([m for m, _ in pairs]), np.stack([mask for _, mask in pairs])).iou if pairs else None
    return row_of(method, results) | {"iou_oracle": oracle}


def with_intervals(method: Method, results: Sequence[RunResult], resamples: int = 200, seed: int = 0) -> dict[str, Any]:
    """A row with 90 % bootstrap intervals over runs."""
    row, rng = full_row(method, results), np.random.default_rng(seed)
    drawn = [row_of(method, [results[i] for i in rng.integers(len(results), size=len(results))]) for _ in range(resamples)]
    for key in INTERVALS:
        values = [d[key] for d in drawn if d[key] is not None]
        row[f"{key}_interval"] = [float(q) for q in np.quantile(values, [0.05, 0.95])] if values and len(results) > 1 else None
    return row


def all_rows(product: Sequence[RunResult], config: MemWatchConfig, tick: Callable[[str], object] = lambda what: None) -> list[dict[str, Any]]:
    """The whole table, the shipped default (``run_product`` of every run) first."""
    signals, levels = config.signals, config.levels
    level = f"{signals.combine} {','.join(map(str, levels.timesteps))}"
    name = Method("memwatch", signals.decide, signals.baseline, level, levels.draws)
    rows = [with_intervals(name, product) | {"default": True}]
    for method in all_methods():
        tick(f"{method.method} {method.signal} {method.baseline} {method.level} {method.draws}")
        results = [run_method(method, p.run) for p in product]
        leave_one_out(results)
        rows.append((full_row if method.method == "memwatch" else with_intervals)(method, results))
    return rows


def stored_table(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """What became stored: by kind and dose, showings by the end, and share of generations that are copies."""
    rows = []
    for kind in PLANTED:
        for dose in sorted({item.dose for run in runs for item in run.of_kind(kind)}):
            items = [(run, item) for run in runs for item in run.of_kind(kind) if item.dose == dose]
            ratios = [np.mean(run.numbers[run.steps[-1]]["copy_ratio"][item.name]) for run, item in items]
            rows.append({
                "kind": str(kind), "dose": dose, "exposures": float(np.mean([run.exposures(item, run.steps[-1]) for run, item in items])),
                "copied": float(np.mean([run.copied(item, run.steps[-1]) for run, item in items])), "distance_ratio": float(np.mean(ratios)),
                "stored": sum(item.name in {s.name for s in run.stored} for run, item in items), "items": len(items),
            })  # fmt: skip
    return rows

