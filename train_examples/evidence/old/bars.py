"""Bars: what the evidence is meant to reach, and does or does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evidence.rivals.maps import PROMPTED
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.product import Product
from evidence.verdicts.stops import close_to_lowest, no_copies
from evidence.verdicts.tables import (
    ALL,
    SIZES,
    before_copy,
    by_world,
    mean_iou,
    null_table,
    precision,
    recall,
    separation,
    size_name,
)
from evidence.worlds.items import Kind

IOU = dict(zip(SIZES, (0.90, 0.80, 0.60, None), strict=False))  # by size of the region; of the smallest only reported
EVERY_WORLD = 0.95  # precision, and recall
RANKING, RATE = 0.99, 0.90  # AUC, and TPR at 1 % FPR
BEFORE, CLEAN, NEAR = 0.95, 0.95, 0.95
FALSE_RUNS, FALSE_RUNS_AT_MOST = 0.05, 0.10


def bar_table(products: Sequence[Product], localization: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Number, bar, what was measured, and whether the bar is met; ``localization`` as ``contest`` makes it."""
    planted = [p for p in products if p.run.planted]
    rows = [at_least(f"IoU, {size_name(*size)}", bar, mean_iou(planted, *size)) for size, bar in IOU.items()]
    rows.append(against_oracles(localization))
    rows += [
        every_world("precision", precision, products),
        every_world("recall", recall, products),
    ]
    rows.append(false_runs(products))
    auc, rate = separation(products, Kind.ORDINARY, Kind.LEARNED)
    rows.append(at_least("AUC against ordinary and learned", RANKING, auc))
    rows.append(at_least("TPR at 1 % FPR against them", RATE, rate))
    rows.append(at_least("called before the first copy", BEFORE, before_copy(planted)))
    rows.append(at_least("stops with nothing copied", CLEAN, no_copies(planted)))
    rows.append(at_least("stops within 2 % of the lowest held-out loss", NEAR, close_to_lowest(planted)))
    return rows


def by_both_rules(
    first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]], name: str
) -> list[dict[str, str]]:
    """Bars by the region rule, with what the same runs give by another rule for copies of that name."""
    return [
        {**row, f"by {name}": other["measured"], f"met by {name}": other["met"]}
        for row, other in zip(first, second, strict=True)
    ]


def at_least(name: str, bar: float | None, found: Estimate) -> dict[str, str]:
    met = "reported" if bar is None else answer(None if found.value is None else found.value >= bar)
    return {"number": name, "bar": "-" if bar is None else f">= {bar:.2f}", "measured": str(found), "met": met}


def answer(met: bool | None) -> str:
    return {None: "not measured", True: "yes", False: "**no**"}[met]


def every_world(name: str, estimate: Any, products: Sequence[Product]) -> dict[str, str]:
    """A number that every world must reach; all together, and the lowest world."""
    found = {world: estimate(group) for world, group in by_world(products).items()}
    known = {world: e.value for world, e in found.items() if e.value is not None and world != ALL}
    if not known:
        return {"number": name, "bar": f">= {EVERY_WORLD:.2f}, in every world", "measured": "-", "met": answer(None)}
    lowest = min(known, key=lambda world: known[world])
    measured = f"{found[ALL]}; lowest {known[lowest]:.3f} ({lowest})"
    met = answer(known[lowest] >= EVERY_WORLD)
    return {"number": name, "bar": f">= {EVERY_WORLD:.2f}, in every world", "measured": measured, "met": met}


def false_runs(products: Sequence[Product]) -> dict[str, str]:
    name, bar = (
        "runs with nothing planted that call",
        f"<= {FALSE_RUNS:.2f}, at most {FALSE_RUNS_AT_MOST:.2f}",
    )
    rows = [row for row in null_table(products) if row["probes"] == "nothing planted, all probes"]
    if not rows:
        return {"number": name, "bar": bar, "measured": "-", "met": answer(None)}
    (row,) = rows
    rate, most = row["runs with a memorized"] / row["runs"], row["at most (95 %)"]
    measured = f"{row['runs with a memorized']} of {row['runs']}, at most {most:.3f}"
    return {
        "number": name,
        "bar": bar,
        "measured": measured,
        "met": answer(rate <= FALSE_RUNS and most <= FALSE_RUNS_AT_MOST),
    }


def against_oracles(localization: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """memwatch's IoU at the shipped rule against the best oracle of any rival, in every world."""
    name, bar = "IoU against every rival's oracle", "above, in every world"
    shipped = next((r for r in localization if r["way"] == "memwatch" and r["threshold"] == "as shipped"), None)
    oracles = [r for r in localization if r["way"] != "memwatch" and r["threshold"] == "oracle"]
    if shipped is None or not oracles:
        return {"number": name, "bar": bar, "measured": "-", "met": answer(None)}
    worlds = [key for key in shipped if key not in (PROMPTED, ALL) and isinstance(shipped[key], float)]
    best = {w: max(row[w] for row in oracles if isinstance(row[w], float)) for w in worlds}
    above = [w for w in worlds if shipped[w] > best[w]]
    said = "; ".join(f"{w} {shipped[w]:.2f} against {best[w]:.2f}" for w in worlds)
    measured = f"above in {len(above)} of {len(worlds)} worlds [{said}]"
    return {"number": name, "bar": bar, "measured": measured, "met": answer(len(above) == len(worlds))}
