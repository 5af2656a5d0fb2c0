"""Rows: every method on the same checkpoints, against exact masks and measured copies, one line of numbers each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from tqdm import tqdm

from memwatch.bench.items import Item, Kind
from memwatch.bench.methods import Method, configured
from memwatch.bench.metrics import auc, best_of_thresholds, overlap, tpr_at_fpr
from memwatch.bench.results import RunResult, leave_one_out, run_method
from memwatch.config import MemWatchConfig

NEGATIVES = (Kind.HELD_OUT, Kind.LEARNED, Kind.CONSTRAINED, Kind.ORDINARY)
INTERVALS = (
    "iou_fixed miou_fixed iou_oracle pixel_auroc auc_heldout auc_learned auc_constrained tpr1_heldout tpr5_heldout "
    "auc_ordinary called_stored called_learned called_constrained called_heldout called_ordinary false_alarms_per_run "
    "lead_fraction lead_exposures"
).split()


@dataclass(frozen=True)
class Row:
    """A line of ``bench.json``, and what it was made from."""

    method: Method
    numbers: dict[str, Any]
    results: Sequence[RunResult]


def all_rows(product: Sequence[RunResult], config: MemWatchConfig, methods: Sequence[Method]) -> list[Row]:
    """The whole table, the configured default (``run_product`` of every run) first."""
    name = configured(config)
    table = [Row(name, with_intervals(name, product) | {"default": True}, product)]
    # run by run: what was measured stays at hand for all methods
    by_run = [[run_method(method, p.run) for method in tqdm(methods, desc=p.run.name)] for p in product]
    for method, results in zip(methods, zip(*by_run, strict=True), strict=True):
        leave_one_out(results)
        table.append(Row(method, with_intervals(method, results), results))
    return table


def names_of(method: Method) -> dict[str, Any]:
    return {key: getattr(method, key) for key in ("method", "signal", "baseline", "level", "draws", "probe")}


def with_intervals(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """A row with 90 % bootstrap intervals over runs (``KEY_interval``) beside the numbers that need one.

    All resamples of so few runs are counted, each as often as chance would draw it. They are ``None`` for a single run.
    """
    row, n = row_of(method, results), len(results)
    if n == 1:
        return row | {f"{key}_interval": None for key in INTERVALS}
    draws = list(combinations_with_replacement(range(n), n))
    orders = [math.factorial(n) / math.prod(map(math.factorial, Counter(draw).values())) for draw in draws]
    weights = np.array(orders) / n**n
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


def row_of(method: Method, results: Sequence[RunResult]) -> dict[str, Any]:
    """One line of ``bench.json``."""
    alerts = any(r.first_alert for r in results) or not method.only_last
    found = alerts_of(results) if alerts else dict.fromkeys(alerts_of([]))
    return names_of(method) | localization(results) | detection(results) | found | {"runs": len(results)}


def localization(results: Sequence[RunResult]) -> dict[str, float | None]:
    """Maps against masks, on stored items; ``fixed`` at the threshold of ``predicted``, ``oracle`` at the best one."""
    stored = {kind: [(r, i) for r in results for i in r.run.stored if i.kind is kind] for kind in Kind}
    iou_fixed, miou_fixed = overlap_of(stored[Kind.TEMPLATE])
    pairs = [(r.maps[i.name], i.mask) for r in results for i in r.templates]
    oracle = asdict(best_of_thresholds(*map(np.stack, zip(*pairs, strict=True)))) if pairs else {}
    return {
        "iou_fixed": iou_fixed,
        "miou_fixed": miou_fixed,
        "iou_oracle": oracle.get("iou"),
        "miou_oracle": oracle.get("miou"),
        "pixel_auroc": mean_of([value for r in results for value in r.pixel_auroc.values()]),
        "iou_fixed_logo": overlap_of(stored[Kind.LOGO])[0],
        "iou_fixed_verbatim": overlap_of(stored[Kind.VERBATIM])[0],
    }


def overlap_of(items: Sequence[tuple[RunResult, Item]]) -> tuple[float | None, float | None]:
    """IoU (pixels pooled) and mIoU (mean over items) of the fixed-threshold regions."""
    pairs = [(r.predicted[i.name], i.mask) for r, i in items if i.name in r.predicted]
    if not pairs:
        return None, None
    found = overlap(*map(np.stack, zip(*pairs, strict=True)))
    return float(found.iou), float(found.miou)


def detection(results: Sequence[RunResult]) -> dict[str, float | None]:
    """Scores of stored items against those of every kind of negatives."""
    found: dict[str, float | None] = {}
    positives = [r.scores[i.name] for r in results for i in r.run.stored if i.name in r.scores]
    for kind in NEGATIVES:
        negatives = [r.scores[i.name] for r in results for i in r.run.of_kind(kind) if i.name in r.scores]
        known, key = bool(positives) and bool(negatives), key_of(kind)
        found[f"auc_{key}"] = auc(positives, negatives) if known else None
        for percent in (1, 5):
            found[f"tpr{percent}_{key}"] = tpr_at_fpr(positives, negatives, percent / 100) if known else None
    return found


def key_of(kind: Kind) -> str:
    return str(kind).replace(" ", "")


def alerts_of(results: Sequence[RunResult]) -> dict[str, float | None]:
    """Who was called at any event, and how the first alert stands to the first visible copy, over stored items.

    ``lead_fraction`` is the share that it precedes; ``lead_events`` and ``lead_exposures`` are medians of by how much.
    """
    chosen = {key_of(kind): [(r, i) for r in results for i in r.run.of_kind(kind)] for kind in NEGATIVES}
    chosen["stored"] = [(r, i) for r in results for i in r.run.stored]
    found = {f"called_{key}": mean_of([i.name in r.first_alert for r, i in items]) for key, items in chosen.items()}
    wrong = [sum(i.name in r.first_alert for i in r.run.items if i.kind in NEGATIVES) for r in results]
    first = [(r.run, i, r.first_alert.get(i.name), r.run.first_copy(i)) for r, i in chosen["stored"]]
    both = [(run, i, alert, copy) for run, i, alert, copy in first if alert is not None and copy is not None]
    return found | {
        "false_alarms_per_run": mean_of(wrong),
        "lead_fraction": mean_of([r.precedes(i) for r, i in chosen["stored"]]),
        "lead_exposures": median_of([run.exposures(i, copy) - run.exposures(i, alert) for run, i, alert, copy in both]),
        "lead_events": median_of([run.steps.index(copy) - run.steps.index(alert) for run, _, alert, copy in both]),
    }


def mean_of(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def median_of(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
