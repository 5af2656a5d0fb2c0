"""What memwatch called, against what is stored, on its way, or never copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evidence.metrics import iou
from evidence.verdicts import intervals
from evidence.verdicts.intervals import Estimate, upper_bound
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, first_copy, state_of, stored_items
from evidence.worlds.items import PLANTED, Item, Kind
from evidence.worlds.world import WORLDS

SIZES = {  # shares of the picture
    "30% or more": (0.30, 0.99),
    "12% to 30%": (0.12, 0.30),
    "4% to 12%": (0.04, 0.12),
    "2% to 4%": (0.0, 0.04),
    "the whole picture": (0.99, 1.01),
}
ALL = "all"
NEVER_KINDS = {
    "held out": (Kind.HELD_OUT,),
    "learned": (Kind.LEARNED,),
    "constrained": (Kind.CONSTRAINED,),
    "ordinary": (Kind.ORDINARY,),
    "planted": PLANTED,
}
Choose = Callable[[Product], Sequence[Item]]


def stored(product: Product) -> list[Item]:
    return stored_items(product.run)


def never(*kinds: Kind) -> Choose:
    """Items of these kinds that are not copied, now or later."""
    return lambda p: [i for i in p.run.of_kind(*kinds) if state_of(p.run, i) is State.NEVER]


def is_right(product: Product, item: Item) -> bool:
    """Whether an item that was called memorized is stored, or on its way."""
    return state_of(product.run, item) is not State.NEVER


def called(product: Product) -> list[Item]:
    return [item for item in product.run.watched if product.called(item)]


def is_called_before_copy(product: Product, item: Item) -> bool:
    """Whether an item was called before any generation copied it."""
    alert, copy = product.first_alert.get(item.name), first_copy(product.run, item)
    return alert is not None and (copy is None or alert < copy)


def region_iou(product: Product, item: Item) -> float:
    """IoU of what memwatch lit up with the mask; 0 where it never lit anything."""
    region = product.region(item)
    return 0.0 if region is None else iou(region, item.mask)


def by_world(products: Sequence[Product]) -> dict[str, list[Product]]:
    """Runs with planted items by world, and all of them."""
    planted = [p for p in products if p.run.planted]
    found = {world: [p for p in planted if p.run.world_name == world] for world in WORLDS}
    return {world: group for world, group in found.items() if group} | {ALL: planted}


# --- estimates over items and runs -----------------------------------------------------------------------------------


def recall(products: Sequence[Product]) -> Estimate:
    """Share of stored items that were called."""
    return intervals.share([[p.called(i) for i in stored(p)] for p in products])


def precision(products: Sequence[Product]) -> Estimate:
    """Share of all called items that are stored, or on their way."""
    return intervals.share([[is_right(p, i) for i in called(p)] for p in products])


def before_copy(products: Sequence[Product]) -> Estimate:
    """Share of stored items that were called before any generation copied them."""
    return intervals.share([[is_called_before_copy(p, i) for i in stored(p)] for p in products])


# --- tables ----------------------------------------------------------------------------------------------------------


def world_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """World by world: what is stored and called, and who was called that is never copied, as ``called/all``."""
    rows = []
    for world, group in by_world(products).items():
        states = [state_of(p.run, i) for p in group for i in p.run.watched]
        rows.append(
            {
                "world": world,
                "what": "" if world == ALL else group[0].run.world.says,
                "runs": len(group),
                "stored": states.count(State.STORED),
                "on its way": states.count(State.ON_ITS_WAY),
                "recall": recall(group),
                "precision": precision(group),
                "called before the first copy": before_copy(group),
            }
            | {f"never: {name}": ratio_of(group, never(*kinds)) for name, kinds in NEVER_KINDS.items()}
        )
    return rows


def ratio_of(products: Sequence[Product], choose: Choose) -> str:
    """How many of these were called, of how many."""
    items = [(p, i) for p in products for i in choose(p)]
    return f"{sum(p.called(i) for p, i in items)}/{len(items)}" if items else "-"


def size_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """By the size of the region, all worlds together: overlap, calls and lead on stored items."""
    rows = []
    for name, (low, high) in SIZES.items():
        groups = [[(p, i) for i in stored(p) if low <= i.mask.mean() < high] for p in by_world(products)[ALL]]
        overlap = intervals.mean([[region_iou(p, i) for p, i in g] for g in groups])
        rows.append(
            {
                "size": name,
                "stored": sum(map(len, groups)),
                "IoU": overlap if low < 0.9 else None,
                "called": intervals.share([[p.called(i) for p, i in g] for g in groups]),
                "before the first copy": intervals.share([[is_called_before_copy(p, i) for p, i in g] for g in groups]),
            }
        )
    return rows


def calibration_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """How often p-values of what was never shown fall below a level, at every event; at most that often if right."""
    values = [[p.findings[i.name][s].p for i in p.run.of_kind(Kind.HELD_OUT) for s in p.events] for p in products]
    groups = [[value for value in group if value is not None] for group in values]
    return [
        {
            "p at most": level,
            "looks": sum(map(len, groups)),
            "share": intervals.share([[v <= level for v in g] for g in groups]),
        }
        for level in (0.1, 0.05, 0.01, 0.001)
    ]


def null_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Whole runs in which nothing is planted, and the held-out probes of all runs: how many called anything."""
    nulls = [p for p in products if not p.run.planted]
    rows = [any_called("nothing planted, all probes", nulls, lambda p: p.run.watched)] if nulls else []
    return [*rows, any_called("every run, held out", products, lambda p: p.run.of_kind(Kind.HELD_OUT))]


def any_called(name: str, products: Sequence[Product], choose: Choose) -> dict[str, Any]:
    memorized = sum(any(p.called(i) for i in choose(p)) for p in products)
    return {
        "probes": name,
        "runs": len(products),
        "probes in a run": max(len(choose(p)) for p in products),
        "runs with a memorized": memorized,
        "rate": memorized / len(products),
        "at most (95 %)": upper_bound(memorized, len(products)),
        "runs with a suspicious": sum(any(i.name in p.first_suspicion for i in choose(p)) for p in products),
    }


def mistakes(products: Sequence[Product]) -> Mapping[str, list[str]]:
    """What was called and is never copied, and what is stored and was never called; run and item."""
    wrong = [f"{p.run.name} {i.name}" for p in products for i in called(p) if not is_right(p, i)]
    missed = [f"{p.run.name} {i.name}" for p in products for i in stored(p) if not p.called(i)]
    return {"called, never copied": wrong, "stored, never called": missed}
