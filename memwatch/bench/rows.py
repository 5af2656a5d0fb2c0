"""The comparison: every method on the same checkpoints, against exact masks and measured copies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from torch import nn

from memwatch.bench.items import DOSES, PLANTED, Item, Kind
from memwatch.bench.methods import Method, all_methods
from memwatch.bench.results import RunResult, is_template, leave_one_out, run_method
from memwatch.bench.sscd import similarity
from memwatch.config import MemWatchConfig
from memwatch.evaluation import auc, best_of_thresholds, overlap, tpr_at_fpr

NEGATIVES = (Kind.HELD_OUT, Kind.LEARNED, Kind.CONSTRAINED)


def row_of(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """One line of ``bench.json``."""
    pixel = [value for r in results for value in r.pixel_auroc.values()]
    positives = [r.scores[i.name] for r in results for i in r.run.stored]
    negatives = {kind: [r.scores[i.name] for r in results for i in r.run.of_kind(kind)] for kind in NEGATIVES}
    held_out = negatives[Kind.HELD_OUT]
    known = bool(positives) and bool(held_out)
    alerts = any(r.first_alert for r in results) or not method.only_last
    pairs = [(r.maps[i.name], i.mask) for r in results for i in r.templates]
    oracle = (
        best_of_thresholds(np.stack([m for m, _ in pairs]), np.stack([mask for _, mask in pairs])) if pairs else None
    )
    stored = [(r, i) for r in results for i in r.run.stored]
    iou_fixed, miou_fixed = _overlap([(r, i) for r, i in stored if is_template(i)])
    row = {
        "method": method.method,
        "signal": method.signal,
        "baseline": method.baseline,
        "level": method.level,
        "draws": method.draws,
        "probe": method.probe,
        "iou_fixed": iou_fixed,
        "miou_fixed": miou_fixed,
        "iou_oracle": oracle.iou if oracle else None,
        "miou_oracle": oracle.miou if oracle else None,
        "pixel_auroc": _mean(pixel),
        "iou_fixed_logo": _overlap([(r, i) for r, i in stored if i.kind is Kind.LOGO])[0],
        "iou_fixed_verbatim": _overlap([(r, i) for r, i in stored if i.kind is Kind.VERBATIM])[0],
    }
    for kind, scores in negatives.items():
        key = str(kind).replace(" ", "")
        row[f"auc_{key}"] = auc(positives, scores) if known and scores else None
        for percent in (1, 5):
            row[f"tpr{percent}_{key}"] = tpr_at_fpr(positives, scores, percent / 100) if known and scores else None
        row[f"called_{key}"] = called(results, lambda i, _, kind=kind: i.kind is kind) if alerts else None  # type: ignore[misc]
    row["called_stored"] = called(results, lambda i, r: r.run.is_stored(i)) if alerts else None
    wrong = [sum(i.name in r.first_alert for i in r.run.items if i.kind in NEGATIVES) for r in results]
    row["false_alarms_per_run"] = float(np.mean(wrong)) if alerts else None
    return row | lead_of(results, alerts) | {"runs": len(results)}


def called(results: Sequence[RunResult], chosen: Callable[[Item, RunResult], bool]) -> float | None:
    """Share of the chosen items with an alert at any event."""
    return _mean([item.name in r.first_alert for r in results for item in r.run.items if chosen(item, r)])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def lead_of(results: Sequence[RunResult], alerts: bool) -> dict[str, float | None]:
    """How the first alert stands to the first visible copy, over stored items: share that it precedes, and by how many events and showings."""
    if not alerts:
        return {"lead_fraction": None, "lead_exposures": None, "lead_events": None}
    before, exposures, events = [], [], []
    for r in results:
        for item in r.run.stored:
            alert, copy = r.first_alert.get(item.name), r.run.first_copy(item)
            before.append(precedes(r, item))
            if alert is not None and copy is not None:
                exposures.append(r.run.exposures(item, copy) - r.run.exposures(item, alert))
                events.append(r.run.steps.index(copy) - r.run.steps.index(alert))
    return {"lead_fraction": _mean(before), "lead_exposures": _median(exposures), "lead_events": _median(events)}


def with_intervals(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """A row, and beside every number that needs one its 90 % bootstrap interval over runs (``KEY_interval``; ``None`` from a single run).

    All resamples of so few runs are counted, each as often as chance would draw it.
    """
    row, n = row_of(method, results), len(results)
    if n == 1:
        return row | {f"{key}_interval": None for key in INTERVALS}
    draws = list(combinations_with_replacement(range(n), n))
    weights = np.array(
        [math.factorial(n) / math.prod(map(math.factorial, Counter(draw).values())) / n**n for draw in draws]
    )
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
    "iou_fixed",
    "miou_fixed",
    "iou_oracle",
    "pixel_auroc",
    "auc_heldout",
    "auc_learned",
    "auc_constrained",
    "tpr1_heldout",
    "tpr5_heldout",
    "called_stored",
    "called_learned",
    "called_constrained",
    "called_heldout",
    "false_alarms_per_run",
    "lead_fraction",
    "lead_exposures",
)


def all_rows(
    product: Sequence[RunResult], config: MemWatchConfig, tick: Callable[[str], object] = lambda what: None
) -> list[Row]:
    """The whole table, the shipped default (``run_product`` of every run) first."""
    signals, levels = config.signals, config.levels
    level = f"{signals.combine} {','.join(map(str, levels.timesteps))}"
    baseline = f"{signals.baseline} and unconditional" if signals.decide == "both_baselines" else signals.baseline
    name = Method("memwatch", signals.decide, baseline, level, levels.draws)
    table = [Row(name, with_intervals(name, product) | {"default": True}, product)]
    for method in all_methods():
        tick(f"{method.method} {method.signal} {method.baseline} {method.level} {method.draws}")
        results = [run_method(method, p.run) for p in product]
        leave_one_out(results)
        table.append(Row(method, with_intervals(method, results), results))
    return table


@dataclass(frozen=True)
class Row:
    """A line of ``bench.json``, and what it was made from."""

    method: Method
    numbers: dict[str, Any]
    results: Sequence[RunResult]


def stored_table(results: Sequence[RunResult], sscd: nn.Module | None = None) -> list[dict[str, Any]]:
    """What became stored: by kind and dose, showings by the end, share of generations that are copies, and what one method called.

    Args:
        sscd: a copy descriptor; with it the median similarity of generation and item inside the mask.
    """
    rows = []
    for kind in PLANTED:
        for dose in DOSES:
            items = [(r, item) for r in results for item in r.run.of_kind(kind) if item.dose == dose]
            last = [(r.run, item, r.run.steps[-1]) for r, item in items]
            row = {
                "kind": str(kind),
                "dose": dose,
                "exposures": float(np.mean([run.exposures(item, step) for run, item, step in last])),
                "copied": float(np.mean([run.copied(item, step) for run, item, step in last])),
                "distance_ratio": float(
                    np.median([np.median(run.numbers[step]["copy_ratio"][item.name]) for run, item, step in last])
                ),
                "items": len(items),
                "stored": sum(run.is_stored(item) for run, item, _ in last),
                "called": sum(item.name in r.first_alert for r, item in items),
            }
            if sscd is not None:
                row["sscd"] = float(np.median([similarity(sscd, run, item) for run, item, _ in last]))
            rows.append(row)
    return rows


SIZES = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.30), (0.30, 0.99), (0.99, 1.0))  # shares of the picture


def size_table(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """By the size of the region: overlap, alerts and lead of one method on stored items, and on all of the largest dose, copied exactly or not."""
    rows = []
    for low, high in SIZES:
        within = [(r, i) for r in results for i in r.run.planted if low < i.mask.mean() <= high]
        stored = [(r, i) for r, i in within if r.run.is_stored(i)]
        strong = [(r, i) for r, i in within if i.dose == DOSES[-1]]
        iou, miou = _overlap(stored)
        rows.append(
            {
                "size": "the whole picture"
                if low > 0.9
                else f"{low:.0%} to {high:.0%}"
                if low
                else f"below {high:.0%}",
                "stored": len(stored),
                "iou_fixed": iou,
                "miou_fixed": miou,
                "called": _mean([i.name in r.first_alert for r, i in stored]),
                "before_copy": _mean([precedes(r, i) for r, i in stored]),
                f"dose x{DOSES[-1]}": len(strong),
                "their iou_fixed": _overlap(strong)[0],
                "their called": _mean([i.name in r.first_alert for r, i in strong]),
            }
        )
    return rows


def _overlap(items: Sequence[tuple[RunResult, Item]]) -> tuple[float | None, float | None]:
    """IoU (pixels pooled) and mIoU (mean over items) of the fixed-threshold regions."""
    pairs = [(r.predicted[i.name], i.mask) for r, i in items if i.name in r.predicted]
    if not pairs:
        return None, None
    found = overlap(*(np.stack(side) for side in zip(*pairs, strict=True)))
    return float(found.iou), float(found.miou)


def precedes(result: RunResult, item: Item) -> bool:
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
        found.append(
            {
                "method": "memwatch, the default" if row is rows[0] else n["method"],
                "called_stored": n["called_stored"],
                "called_heldout": n["called_heldout"],
                "called_learned": n["called_learned"],
                "showings_at_first_alert": _median(exposures),
                "lead_fraction": n["lead_fraction"],
                "memwatch_earlier": _mean([a < b for a, b in first]),
                "memwatch_later": _mean([a > b for a, b in first]),
            }
        )
    return found


CRITERIA = (
    "iou_oracle",
    "auc_heldout",
    "auc_learned",
    "lead_fraction",
)  # what a default is chosen by, with equal weight
CHOICE = (
    "iou_fixed",
    "auc_heldout",
    "tpr1_heldout",
    "auc_learned",
    "called_stored",
    "called_learned",
    "called_heldout",
    "lead_fraction",
)


def choice_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What one would ship knowing all runs but one, and how that does on the one: nothing is tuned on the run that it is reported on."""
    runs = range(len(rows[0].results))
    candidates = [
        row for row in rows[1:] if row.numbers["method"] == "memwatch" and row.numbers["probe"] == "reference"
    ]
    found = []
    for left_out in runs if len(runs) > 1 else ():

        def merit(row: Row, left_out: int = left_out) -> float:
            numbers = row_of(row.method, [r for i, r in enumerate(row.results) if i != left_out])
            return sum(numbers[key] or 0.0 for key in CRITERIA)

        best = max(candidates, key=merit)
        n = row_of(best.method, [best.results[left_out]])
        keys = ("signal", "baseline", "level", "draws", *CHOICE)
        found.append({"left out": best.results[left_out].run.name} | {key: n[key] for key in keys})
    return found
