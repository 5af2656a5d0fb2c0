"""The comparison: every method on the same checkpoints, against exact masks and measured copies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from torch import nn

from memwatch.alerts import ProbeState, Verdict
from memwatch.bench.items import PLANTED, SIZE, Item, Kind
from memwatch.bench.look import CURVATURE, LEVELS
from memwatch.bench.methods import Method, all_methods, bar_of, baseline_step, maps_of, scores_of
from memwatch.bench.runs import Finished
from memwatch.bench.sscd import similarity
from memwatch.config import MemWatchConfig
from memwatch.curvature import CurvatureMap
from memwatch.evaluation import auc, best_of_thresholds, overlap, resized, tpr_at_fpr
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


def overlap_of(results: Sequence[RunResult], chosen: Callable[[Item], bool]) -> tuple[float | None, float | None]:
    """IoU (pixels pooled) and mIoU (mean over items) of the fixed-threshold regions of the chosen stored items."""
    pairs = [(r.predicted[i.name], i.mask) for r in results for i in r.run.stored if chosen(i) and i.name in r.predicted]
    if not pairs:
        return None, None
    found = overlap(*(np.stack(side) for side in zip(*pairs, strict=True)))
    return found.iou, found.miou


def is_template(item: Item) -> bool:
    return item.kind is Kind.TEMPLATE


def is_logo(item: Item) -> bool:
    return item.kind is Kind.LOGO


def row_of(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """One line of ``bench.json``."""
    pixel = [value for r in results for value in r.pixel_auroc.values()]
    positives = [r.scores[i.name] for r in results for i in r.run.stored]
    negatives = {kind: [r.scores[i.name] for r in results for i in r.run.of_kind(kind)] for kind in NEGATIVES}
    held_out = negatives[Kind.HELD_OUT]
    known = bool(positives) and bool(held_out)
    alerts = any(r.first_alert for r in results) or not method.only_last
    pairs = [(r.maps[i.name], i.mask) for r in results for i in r.templates]
    oracle = best_of_thresholds(np.stack([m for m, _ in pairs]), np.stack([mask for _, mask in pairs])) if pairs else None
    iou_fixed, miou_fixed = overlap_of(results, is_template)
    row = {
        "method": method.method, "signal": method.signal, "baseline": method.baseline, "level": method.level, "draws": method.draws,
        "probe": method.probe,
        "iou_fixed": iou_fixed, "miou_fixed": miou_fixed,
        "iou_oracle": oracle.iou if oracle else None, "miou_oracle": oracle.miou if oracle else None,
        "pixel_auroc": float(np.mean(pixel)) if pixel else None,
        "iou_fixed_logo": overlap_of(results, is_logo)[0], "iou_fixed_verbatim": overlap_of(results, lambda i: i.kind is Kind.VERBATIM)[0],
    }  # fmt: skip
    for kind, scores in negatives.items():
        key = str(kind).replace(" ", "")
        row[f"auc_{key}"] = auc(positives, scores) if known and scores else None
        for percent in (1, 5):
            row[f"tpr{percent}_{key}"] = tpr_at_fpr(positives, scores, percent / 100) if known and scores else None
        row[f"called_{key}"] = called(results, lambda i, _, kind=kind: i.kind is kind) if alerts else None  # type: ignore[misc]
    row["called_stored"] = called(results, lambda i, r: i.name in {s.name for s in r.run.stored}) if alerts else None
    wrong = [sum(i.name in r.first_alert for i in r.run.items if i.kind in NEGATIVES) for r in results]
    row["false_alarms_per_run"] = float(np.mean(wrong)) if alerts else None
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
            before.append(_precedes(r, item))
            if alert is not None and copy is not None:
                exposures.append(r.run.exposures(item, copy) - r.run.exposures(item, alert))
                events.append(r.run.steps.index(copy) - r.run.steps.index(alert))
    return {
        "lead_fraction": float(np.mean(before)) if before else None,
        "lead_exposures": float(np.median(exposures)) if exposures else None,
        "lead_events": float(np.median(events)) if events else None,
    }


def with_intervals(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """A row, and beside every number that needs one its 90 % bootstrap interval over runs (``KEY_interval``; ``None`` from a single run).

    All resamples of so few runs are counted, each as often as chance would draw it.
    """
    row, n = row_of(method, results), len(results)
    if n == 1:
        return row | {f"{key}_interval": None for key in INTERVALS}
    draws = list(combinations_with_replacement(range(n), n))
    weights = np.array([math.factorial(n) / math.prod(map(math.factorial, Counter(draw).values())) / n**n for draw in draws])
    drawn = [row_of(method, [results[i] for i in draw]) for draw in draws]
    for key in INTERVALS:
        known = [i for i, d in enumerate(drawn) if d[key] is not None]
        row[f"{key}_interval"] = _interval(np.array([drawn[i][key] for i in known]), weights[known]) if known else None
    return row


def _interval(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """The 5 % and 95 % quantiles of weighted values."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order]) / weights.sum()
    return [float(values[order][min(int(np.searchsorted(cumulated, q)), len(values) - 1)]) for q in (0.05, 0.95)]


INTERVALS = (
    "iou_fixed", "miou_fixed", "iou_oracle", "pixel_auroc", "auc_heldout", "auc_learned", "auc_constrained", "tpr1_heldout", "tpr5_heldout",
    "called_stored", "called_learned", "called_constrained", "called_heldout", "false_alarms_per_run", "lead_fraction", "lead_exposures",
)  # fmt: skip


def all_rows(product: Sequence[RunResult], config: MemWatchConfig, tick: Callable[[str], object] = lambda what: None) -> list[Row]:
    """The whole table, the shipped default (``run_product`` of every run) first."""
    signals, levels = config.signals, config.levels
    level = f"{signals.combine} {','.join(map(str, levels.timesteps))}"
    name = Method("memwatch", signals.decide, signals.baseline, level, levels.draws)
    table = [Row(with_intervals(name, product) | {"default": True}, product)]
    for method in all_methods():
        tick(f"{method.method} {method.signal} {method.baseline} {method.level} {method.draws}")
        results = [run_method(method, p.run) for p in product]
        leave_one_out(results)
        table.append(Row(with_intervals(method, results), results))
    return table


@dataclass(frozen=True)
class Row:
    """A line of ``bench.json``, and what it was made from."""

    numbers: dict[str, Any]
    results: Sequence[RunResult]


def stored_table(runs: Sequence[Finished], sscd: nn.Module | None = None) -> list[dict[str, Any]]:
    """What became stored: by kind and dose, showings by the end, and share of generations that are copies.

    Args:
        sscd: a copy descriptor; with it the median similarity of generation and item inside the mask.
    """
    rows = []
    for kind in PLANTED:
        for dose in sorted({item.dose for run in runs for item in run.of_kind(kind)}):
            items = [(run, item) for run in runs for item in run.of_kind(kind) if item.dose == dose]
            ratios = [np.median(run.numbers[run.steps[-1]]["copy_ratio"][item.name]) for run, item in items]
            row = {
                "kind": str(kind), "dose": dose, "exposures": float(np.mean([run.exposures(item, run.steps[-1]) for run, item in items])),
                "copied": float(np.mean([run.copied(item, run.steps[-1]) for run, item in items])), "distance_ratio": float(np.median(ratios)),
                "stored": sum(item.name in {s.name for s in run.stored} for run, item in items), "items": len(items),
            }  # fmt: skip
            if sscd is not None:
                row["sscd"] = float(np.median([similarity(sscd, run, item) for run, item in items]))
            rows.append(row)
    return rows


SIZES = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.30), (0.30, 0.99), (0.99, 1.0))  # shares of the picture


def size_table(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Stored items by the size of their region: overlap, alerts and lead of one method."""
    rows = []
    for low, high in SIZES:
        items = [(r, i) for r in results for i in r.run.stored if low < i.mask.mean() <= high]
        names = {(id(r), i.name) for r, i in items}
        shown = [(r.predicted[i.name], i.mask) for r, i in items if i.name in r.predicted]
        found = overlap(*(np.stack(side) for side in zip(*shown, strict=True))) if shown else None
        rows.append({
            "size": "the whole picture" if low > 0.9 else f"{low:.0%} to {high:.0%}" if low else f"below {high:.0%}", "stored": len(names),
            "iou_fixed": found.iou if found else None, "miou_fixed": found.miou if found else None,
            "called": float(np.mean([i.name in r.first_alert for r, i in items])) if items else None,
            "before_copy": float(np.mean([_precedes(r, i) for r, i in items])) if items else None,
        })  # fmt: skip
    return rows


def _precedes(result: RunResult, item: Item) -> bool:
    """Whether an item's first alert came before its first visible copy."""
    alert, copy = result.first_alert.get(item.name), result.run.first_copy(item)
    return alert is not None and copy is not None and alert < copy


def first_alerts_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Who said something first: on stored items, the default (the first row) against every rival that can raise an alert."""
    product = rows[0].results
    found = []
    for row in rows:
        n = row.numbers
        if row is not rows[0] and (n["method"] in ("memwatch", "all ones") or n["called_stored"] is None):
            continue
        pairs = [(p, r, i) for p, r in zip(product, row.results, strict=True) for i in r.run.stored]
        first = [(p.first_alert.get(i.name, math.inf), r.first_alert.get(i.name, math.inf)) for p, r, i in pairs]
        exposures = [r.run.exposures(i, r.first_alert[i.name]) for _, r, i in pairs if i.name in r.first_alert]
        found.append({
            "method": "memwatch, the default" if row is rows[0] else n["method"], "called_stored": n["called_stored"],
            "called_heldout": n["called_heldout"], "called_learned": n["called_learned"],
            "showings_at_first_alert": float(np.median(exposures)) if exposures else None,
            "lead_fraction": n["lead_fraction"], "memwatch_earlier": float(np.mean([a < b for a, b in first])) if first else None,
            "memwatch_later": float(np.mean([a > b for a, b in first])) if first else None,
        })  # fmt: skip
    return found
