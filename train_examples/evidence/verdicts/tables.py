"""Verdicts: what memwatch called, against what is stored, on its way, or never copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from evidence.verdicts import intervals
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, first_copy, state_of, stored_items
from evidence.worlds.items import PLANTED, Item, Kind

from memwatch.cli.metrics import auc, iou, tpr_at_fpr
from memwatch.judge.calibration import upper_bound

SIZES = ((0.30, 0.99), (0.12, 0.30), (0.04, 0.12), (0.0, 0.04), (0.99, 1.01))  # shares of the picture
ALL = "all"
NEVER_KINDS = {
    "held out": (Kind.HELD_OUT,),
    "learned": (Kind.LEARNED,),
    "constrained": (Kind.CONSTRAINED,),
    "ordinary": (Kind.ORDINARY,),
    "planted": PLANTED,
}
Pick = Callable[[Product], Sequence[Item]]


def stored(product: Product) -> list[Item]:
    return stored_items(product.run)


def never(*kinds: Kind) -> Pick:
    """Items of these kinds that are not copied, now or later."""
    return lambda p: [i for i in p.run.of_kind(*kinds) if state_of(p.run, i) is State.NEVER]


def localizable(product: Product) -> list[Item]:
    """Stored items whose mask is a part of the picture."""
    return [item for item in stored(product) if not item.mask.all()]


def is_right(product: Product, item: Item) -> bool:
    """Whether an item that was called memorized is stored, or on its way."""
    return state_of(product.run, item) is not State.NEVER


def called(product: Product) -> list[Item]:
    return [item for item in product.run.watched if product.called(item)]


def speaks_before(product: Product, item: Item) -> bool:
    """Whether an item was called before any generation copied it."""
    alert, copy = product.first_alert.get(item.name), first_copy(product.run, item)
    return alert is not None and (copy is None or alert < copy)


def region_iou(product: Product, item: Item) -> float:
    """IoU of what memwatch lit up with the mask; 0 where it never lit anything."""
    region = product.region(item)
    return 0.0 if region is None else iou(region, item.mask)


# --- estimates over items and runs -----------------------------------------------------------------------------------


def recall(products: Sequence[Product]) -> Estimate:
    """Share of stored items that were called."""
    return intervals.share([[p.called(i) for i in stored(p)] for p in products])


def precision(products: Sequence[Product]) -> Estimate:
    """Share of all called items that are stored, or on their way."""
    return intervals.share([[is_right(p, i) for i in called(p)] for p in products])


def before_copy(products: Sequence[Product]) -> Estimate:
    """Share of stored items that were called before any generation copied them."""
    return intervals.share([[speaks_before(p, i) for i in stored(p)] for p in products])


def mean_iou(products: Sequence[Product], low: float = 0.0, high: float = 0.99) -> Estimate:
    """Mean IoU over stored items with masks of these sizes."""
    return intervals.mean([[region_iou(p, i) for i in localizable(p) if low <= i.mask.mean() < high] for p in products])


def separation(products: Sequence[Product], *kinds: Kind) -> tuple[Estimate, Estimate]:
    """AUC, and TPR at 1 % FPR, of stored items against items of these kinds that are never copied.

    Scores are distances from the controls at the last event. Intervals come from runs drawn with replacement, and are
    no narrower than those of a share of as many items as the smaller side has.
    """
    pairs = [
        ([p.score(i) for i in stored(p)], [p.score(i) for i in never(*kinds)(p)]) for p in products if p.run.planted
    ]

    def of(chosen: Iterable[int], metric: Callable[[Sequence[float], Sequence[float]], float]) -> float | None:
        positives, negatives = ([x for i in chosen for x in pairs[i][side]] for side in (0, 1))
        return metric(positives, negatives) if positives and negatives else None

    rng, everything = np.random.default_rng(0), range(len(pairs))
    draws = [list(rng.integers(len(pairs), size=len(pairs))) for _ in range(intervals.RESAMPLES // 2)] if pairs else []
    found = []
    for metric in (auc, tpr_at_fpr):
        value, drawn = of(everything, metric), [of(draw, metric) for draw in draws]
        known = [x for x in drawn if x is not None]
        if value is None or not known:
            found.append(Estimate(None))
        else:
            low, high = np.quantile(known, [(1 - intervals.LEVEL) / 2, (1 + intervals.LEVEL) / 2])
            count = min(sum(len(pair[side]) for pair in pairs) for side in (0, 1))
            found.append(intervals.at_least_exact(value, float(low), float(high), count))
    return found[0], found[1]


# --- tables ----------------------------------------------------------------------------------------------------------


def by_world(products: Sequence[Product]) -> dict[str, list[Product]]:
    """Runs with planted items by world, and all of them."""
    planted = [p for p in products if p.run.planted]
    ordered = sorted(planted, key=world_of)
    return {world: list(group) for world, group in groupby(ordered, world_of)} | {ALL: planted}


def world_of(product: Product) -> str:
    return product.run.world_name


def world_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """World by world: what is stored and called, and who was called that is never copied, as ``called/all``."""
    rows = []
    for world, group in by_world(products).items():
        says = "" if world == ALL else group[0].run.world.says
        states = [state_of(p.run, i) for p in group for i in p.run.watched]
        row: dict[str, Any] = {"world": world, "what": says, "runs": len(group)}
        row |= {"stored": states.count(State.STORED), "on its way": states.count(State.ON_ITS_WAY)}
        row |= {
            "recall": recall(group),
            "precision": precision(group),
            "called before the first copy": before_copy(group),
        }
        row |= {f"never: {name}": ratio_of(group, never(*kinds)) for name, kinds in NEVER_KINDS.items()}
        rows.append(row)
    return rows


def ratio_of(products: Sequence[Product], pick: Pick) -> str:
    """How many of these were called, of how many."""
    items = [(p, i) for p in products for i in pick(p)]
    return f"{sum(p.called(i) for p, i in items)}/{len(items)}" if items else "-"


def size_name(low: float, high: float) -> str:
    if low > 0.9:
        return "the whole picture"
    return f"{low:.0%} or more" if high > 0.9 else f"{low or 0.02:.0%} to {high:.0%}"


def size_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """By the size of the region, all worlds together: overlap, calls and lead on stored items."""
    planted, rows = [p for p in products if p.run.planted], []
    for low, high in SIZES:
        groups = [[(p, i) for i in stored(p) if low <= i.mask.mean() < high] for p in planted]
        partial = low < 0.9
        rows.append(
            {
                "size": size_name(low, high),
                "stored": sum(map(len, groups)),
                "IoU": mean_iou(planted, low, high) if partial else None,
                "called": intervals.share([[p.called(i) for p, i in g] for g in groups]),
                "before the first copy": intervals.share([[speaks_before(p, i) for p, i in g] for g in groups]),
                "planted, never copied, and called": ratio_of(planted, in_size(never(*PLANTED), low, high)),
            }
        )
    return rows


def in_size(pick: Pick, low: float, high: float) -> Pick:
    return lambda p: [item for item in pick(p) if low <= item.mask.mean() < high]


def lead_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """How the first call stands to the first copy, on stored items; both are known to an event."""
    rows = []
    for world, group in by_world(products).items():
        times = [[times_of(p, i) for i in stored(p) if p.called(i)] for p in group]
        flat = [t for g in times for t in g]
        rows.append(
            {
                "world": world,
                "stored and called": len(flat),
                "call before copy": sum(alert < copy for _, alert, copy in flat),
                "at the same event": sum(alert == copy for _, alert, copy in flat),
                "after it": sum(alert > copy for _, alert, copy in flat),
                "suspicious before copy": sum(suspicion < copy for suspicion, _, copy in flat),
                "showings from call to copy, median": spread(times),
            }
        )
    return rows


def times_of(product: Product, item: Item) -> tuple[float, float, float]:
    """Showings of an item by the first ``suspicious``, the first ``memorized`` and the first copy."""
    run, copy = product.run, first_copy(product.run, item)
    assert copy is not None
    suspicion, alert = product.first_suspicion[item.name], product.first_alert[item.name]
    return run.exposures(item, suspicion), run.exposures(item, alert), run.exposures(item, copy)


def spread(times: Sequence[Sequence[tuple[float, float, float]]]) -> str:
    found = intervals.median([[copy - alert for _, alert, copy in group] for group in times])
    return "-" if found.value is None else f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"


def separation_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """How far stored items stand out from what is never copied, by kind; the score is what verdicts rest on."""
    rows = []
    kinds = NEVER_KINDS | {"ordinary and learned": (Kind.ORDINARY, Kind.LEARNED)}
    for name, chosen in kinds.items():
        found, rate = separation(products, *chosen)
        count = sum(len(never(*chosen)(p)) for p in products if p.run.planted)
        rows.append({"against": name, "items": count, "AUC": found, "TPR at 1 % FPR": rate})
    return rows


def calibration_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """How often p-values of what was never shown fall below a level; at most that often, if they are right.

    Probe by probe at every event, and by run: whether any held-out probe was called.
    """
    values = [[p.findings[i.name][s].p for i in p.run.of_kind(Kind.HELD_OUT) for s in p.events] for p in products]
    groups = [[value for value in group if value is not None] for group in values]
    rows: list[dict[str, Any]] = [
        {
            "p at most": level,
            "looks": sum(map(len, groups)),
            "share": intervals.share([[v <= level for v in g] for g in groups]),
        }
        for level in (0.1, 0.05, 0.01, 0.001)
    ]
    return rows


def null_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Whole runs in which nothing is planted, and the held-out probes of all runs: how many called anything."""
    nulls = [p for p in products if not p.run.planted]
    rows = [any_called("nothing planted, all probes", nulls, lambda p: p.run.watched)]
    rows.append(any_called("nothing planted, held out", nulls, lambda p: p.run.of_kind(Kind.HELD_OUT)))
    everything = list(products)
    rows.append(any_called("every run, held out", everything, lambda p: p.run.of_kind(Kind.HELD_OUT)))
    return [row for row in rows if row["runs"]]


def any_called(name: str, products: Sequence[Product], pick: Pick) -> dict[str, Any]:
    memorized = sum(any(p.called(i) for i in pick(p)) for p in products)
    suspicious = sum(any(i.name in p.first_suspicion for i in pick(p)) for p in products)
    return {
        "probes": name,
        "runs": len(products),
        "probes in a run": max((len(pick(p)) for p in products), default=0),
        "runs with a memorized": memorized,
        "rate": f"{memorized / len(products):.3f}" if products else None,
        "at most (95 %)": upper_bound(memorized, len(products)) if products else None,
        "runs with a suspicious": suspicious,
        "runs stopped": sum(p.stop is not None for p in products) if "planted" in name else None,
    }


def mistakes(products: Sequence[Product]) -> Mapping[str, list[str]]:
    """What was called and is never copied, and what is stored and was never called; run and item."""
    wrong = [f"{p.run.name} {i.name}" for p in products for i in called(p) if not is_right(p, i)]
    missed = [f"{p.run.name} {i.name}" for p in products for i in stored(p) if not p.called(i)]
    return {"called, never copied": wrong, "stored, never called": missed}
