"""Tables: what became stored, who said something first, by size, and what one would ship knowing all runs but one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from memwatch.bench.items import DOSES, PLANTED, Item, Kind
from memwatch.bench.results import RunResult
from memwatch.bench.rows import NEGATIVES, Row, mean_of, median_of, overlap_of, row_of
from memwatch.bench.sscd import similarity
from memwatch.judge.calibration import upper_bound

SIZES = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.30), (0.30, 0.99), (0.99, 1.0))  # shares of the picture
CRITERIA = "iou_oracle auc_heldout auc_learned lead_fraction".split()  # what a default is chosen by, with equal weight
CHOICE = (
    "signal baseline level draws iou_fixed auc_heldout tpr1_heldout auc_learned called_stored called_learned "
    "called_heldout lead_fraction"
).split()


def stored_table(results: Sequence[RunResult], sscd: nn.Module | None = None) -> list[dict[str, Any]]:
    """What became stored, by kind and dose.

    It says how often the items were shown by the end, what share of generations are copies, and what the method called.

    Args:
        sscd: a copy descriptor; with it the median similarity of generation and item inside the mask.
    """
    rows = []
    for kind in PLANTED:
        for dose in DOSES:
            items = [(r, item) for r in results for item in r.run.of_kind(kind) if item.dose == dose]
            rows.append({"kind": str(kind), "dose": dose} | _stored(items, sscd))
    return rows


def _stored(items: Sequence[tuple[RunResult, Item]], sscd: nn.Module | None) -> dict[str, Any]:
    last = [(r.run, item, r.run.steps[-1]) for r, item in items]
    ratios = [np.median(run.numbers[step]["copy_ratio"][item.name]) for run, item, step in last]
    row: dict[str, Any] = {
        "exposures": mean_of([run.exposures(item, step) for run, item, step in last]),
        "copied": mean_of([run.copied(item, step) for run, item, step in last]),
        "distance_ratio": float(np.median(ratios)),
        "items": len(items),
        "stored": sum(run.is_stored(item) for run, item, _ in last),
        "called": sum(item.name in r.first_alert for r, item in items),
    }
    if sscd is not None:
        row["sscd"] = median_of([similarity(sscd, run, item) for run, item, _ in last])
    return row


LARGE = 0.15  # of the picture: from here on a region is large


def world_table(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """What memwatch called memorized at any event, run by run: of everything that is stored, and of everything else.

    Shares are written as ``called/all``. ``iou`` is the mean over stored items of that size whose mask is a part of the
    picture. ``unfinished``: planted items that are not copied, and may be on their way.
    """
    rows = []
    for r in results:
        run = r.run
        stored: dict[str, list[Item]] = {"large": [], "small": []}
        for item in run.stored:
            stored["large" if item.mask.mean() >= LARGE else "small"].append(item)
        row: dict[str, Any] = {"run": run.name, "world": run.world.says}
        for size, items in stored.items():
            row |= {f"{size} stored": called_of(r, items), f"{size} iou": overlap_of([(r, i) for i in items])[1]}
        others = [i for i in run.planted if not run.is_stored(i)]
        row |= {str(kind): called_of(r, run.of_kind(kind)) for kind in NEGATIVES}
        rows.append(row | {"unfinished": called_of(r, others), "controls": str(r.audit)})
    return rows


def null_table(nulls: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Whole runs in which nothing is planted: how many called anything, by kind of probe, with 95 % intervals."""
    rows: list[dict[str, Any]] = []
    for kinds in ((Kind.HELD_OUT,), (Kind.ORDINARY,), (Kind.HELD_OUT, Kind.ORDINARY)):
        names = [{i.name for kind in kinds for i in r.run.of_kind(kind)} for r in nulls]
        memorized = sum(bool(mine & set(r.first_alert)) for mine, r in zip(names, nulls, strict=True))
        said = [{f.name for j in r.events.values() for f in j.findings if f.verdict.is_evidence} for r in nulls]
        suspicious = sum(bool(mine & told) for mine, told in zip(names, said, strict=True))
        rows.append(
            {
                "probes": " and ".join(map(str, kinds)),
                "runs": len(nulls),
                "probes per run": max(map(len, names)),
                "runs with a memorized": memorized,
                "at most (95 %)": upper_bound(memorized, len(nulls)),
                "runs with a suspicious": suspicious,
                "controls called": sum(r.audit.called for r in nulls),
                "of controls": sum(r.audit.of for r in nulls),
            }
        )
    return rows


def called_of(result: RunResult, items: Sequence[Item]) -> str:
    """How many of these were called, of how many."""
    return f"{sum(i.name in result.first_alert for i in items)}/{len(items)}" if items else "-"


def size_table(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Overlap, alerts and lead of one method by the size of the region.

    On stored items, and on all items of the largest dose, copied exactly or not.
    """
    rows = []
    for low, high in SIZES:
        within = [(r, i) for r in results for i in r.run.planted if low < i.mask.mean() <= high]
        stored = [(r, i) for r, i in within if r.run.is_stored(i)]
        strong = [(r, i) for r, i in within if i.dose == DOSES[-1]]
        iou, miou = overlap_of(stored)
        size = f"{low:.0%} to {high:.0%}" if low else f"below {high:.0%}"
        rows.append(
            {
                "size": "the whole picture" if low > 0.9 else size,
                "stored": len(stored),
                "iou_fixed": iou,
                "miou_fixed": miou,
                "called": mean_of([i.name in r.first_alert for r, i in stored]),
                "before_copy": mean_of([r.precedes(i) for r, i in stored]),
                f"dose x{DOSES[-1]}": len(strong),
                "their iou_fixed": overlap_of(strong)[0],
                "their called": mean_of([i.name in r.first_alert for r, i in strong]),
            }
        )
    return rows


def first_alerts_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Who said something first: on stored items, the default (the first row) against every rival that can alert."""
    default, *others = rows
    speaking = [row for row in others if row.numbers["called_stored"] is not None]
    rivals = [row for row in speaking if row.method.method not in ("memwatch", "all ones")]
    found = []
    for row in [default, *rivals]:
        stored = [(p, r, i) for p, r in zip(default.results, row.results, strict=True) for i in r.run.stored]
        first = [(p.first_alert.get(i.name, math.inf), r.first_alert.get(i.name, math.inf)) for p, r, i in stored]
        exposures = [r.run.exposures(i, r.first_alert[i.name]) for _, r, i in stored if i.name in r.first_alert]
        found.append(
            {
                "method": "memwatch, the default" if row is default else row.method.method,
                **{key: row.numbers[key] for key in ("called_stored", "called_heldout", "called_learned")},
                "showings_at_first_alert": median_of(exposures),
                "lead_fraction": row.numbers["lead_fraction"],
                "memwatch_earlier": mean_of([a < b for a, b in first]),
                "memwatch_later": mean_of([a > b for a, b in first]),
            }
        )
    return found


def choice_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What one would ship knowing all runs but one, and how that does on the one left out.

    Nothing is tuned on the run that it is reported on.
    """
    runs = range(len(rows[0].results))
    candidates = [row for row in rows[1:] if (row.method.method, row.method.probe) == ("memwatch", "reference")]
    found = []
    for left_out in runs if len(runs) > 1 else ():

        def merit(row: Row, left_out: int = left_out) -> float:
            numbers = row_of(row.method, [r for i, r in enumerate(row.results) if i != left_out])
            return sum(numbers[key] or 0.0 for key in CRITERIA)

        best = max(candidates, key=merit)
        numbers = row_of(best.method, [best.results[left_out]])
        found.append({"left out": best.results[left_out].run.name} | {key: numbers[key] for key in CHOICE})
    return found


def mistakes(product: Sequence[RunResult]) -> list[str]:
    """The default's false alarms, and the stored items that it called too late or never."""
    found = []
    for result in product:
        run = result.run
        for item in run.items:
            alert, copy = result.first_alert.get(item.name), run.first_copy(item)
            if item.kind in NEGATIVES and alert is not None:
                found.append(f"{run.name} called {item.name} ({item.kind}) at step {alert}")
            if run.is_stored(item) and not result.precedes(item):
                called = "never" if alert is None else f"at step {alert}"
                found.append(f"{run.name} {item.name} copied at step {copy}, called {called}")
    return found
