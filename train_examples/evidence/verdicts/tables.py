"""What memwatch said of the runs of twins, against what the twins say: the numbers that have a bar, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from evidence.metrics import auc, iou
from evidence.verdicts import intervals
from evidence.verdicts.intervals import Estimate
from evidence.verdicts.product import Product
from evidence.verdicts.truth import Truth
from evidence.worlds.items import PLANTED, Item, Kind
from memwatch.config import MemWatchConfig
from memwatch.measure.measure import count_passes

SIZES = {  # shares of the picture, and the bar of the mean IoU
    "over 30 %": (0.30, 0.99, 0.85),
    "12 to 30 %": (0.12, 0.30, 0.80),
    "4 to 12 %": (0.04, 0.12, 0.65),
    "2 to 4 %": (0.0, 0.04, 0.40),
}


@dataclass(frozen=True)
class Judged:
    """One of two twins: what memwatch said of it, and what both say."""

    product: Product
    truth: Truth

    @property
    def last(self) -> int:
        return self.product.run.last

    def group(self, name: str) -> list[Item]:
        """Items by what they are in this half: ``stored``, ``out`` (the other half's), ``learned``, ``held out``."""
        run = self.product.run
        kinds = (*PLANTED, Kind.CONSTRAINED)
        recurring = [i for i in run.watched if i.kind in kinds]
        match name:
            case "stored":
                return [i for i in recurring if i.is_in(run.half) and self.truth.is_stored(i, self.last)]
            case "out":
                return [i for i in recurring if i.half not in ("", run.half)]
            case "learned":
                return [i for i in run.watched if i.kind is Kind.LEARNED and (i.is_in(run.half) or not i.dose)]
            case _:
                return [i for i in run.watched if i.kind is Kind.HELD_OUT]

    @property
    def called(self) -> list[Item]:
        return [i for i in self.product.run.watched if self.product.called(i)]

    @property
    def copied(self) -> list[Item]:
        return [i for i in self.product.run.watched if self.truth.is_copied(i)]

    def lead(self, item: Item) -> int | None:
        """Steps from the call to the first copy; ``None`` where it was never called."""
        alert, copy = self.product.first_alert.get(item.name), self.truth.first_copy(item)
        return None if alert is None or copy is None else copy - alert


# --- numbers ---------------------------------------------------------------------------------------------------------


def detection(judged: Sequence[Judged], against: str, step: int | None = None) -> float | None:
    """AUC of T at an event, the last one by default: what is stored against a group."""
    stored, others = (
        [j.product.score(i, step or j.last) for j in judged for i in j.group(name)] for name in ("stored", against)
    )
    return auc(stored, others) if stored and others else None


def confirmed(judged: Sequence[Judged]) -> Estimate:
    """Of what is called, the share that the twin confirms as stored."""
    return intervals.share([[j.truth.is_stored(i, j.last) for i in j.called] for j in judged])


def of_copied(judged: Sequence[Judged], holds: Callable[[Judged, Item], bool]) -> Estimate:
    """Of what is copied at the end, the share of which something holds."""
    return intervals.share([[holds(j, i) for i in j.copied] for j in judged])


def is_called(j: Judged, item: Item) -> bool:
    return j.product.called(item)


def is_before(j: Judged, item: Item) -> bool:
    lead = j.lead(item)
    return lead is not None and lead > 0


def is_in_time(j: Judged, item: Item) -> bool:
    lead = j.lead(item)
    return lead is not None and lead >= 0


def overlap(judged: Sequence[Judged], low: float, high: float) -> Estimate:
    """Mean IoU with the mask of copied regions of this size, at the last event; 0 where there is no region."""
    return intervals.mean(
        [[iou(j.product.region(i, j.last), i.mask) for i in j.copied if low <= i.mask.mean() < high] for j in judged]
    )


def agreement(judged: Sequence[Judged]) -> Estimate:
    """Mean rank correlation, over pixels, of the heatmap with the twins' own gap map, of copied parts of pictures."""

    def of(j: Judged, item: Item) -> float:
        signals = j.product.findings[item.name][j.last].signals
        assert signals is not None
        assert signals.heatmap is not None
        gaps = j.truth.gap_map(item, j.last)
        return float(spearmanr(signals.heatmap.mean.numpy().ravel(), gaps.ravel()).statistic)

    return intervals.mean([[of(j, i) for i in j.copied if not i.mask.all()] for j in judged])


# --- tables ----------------------------------------------------------------------------------------------------------


def bar_table(judged: Sequence[Judged], config: MemWatchConfig) -> list[dict[str, Any]]:
    """Every number that has a bar, and one that has none."""
    passes = count_passes(config, 1, 0)
    rows = [
        row("AUC of what is stored against the same pictures in the other twin", detection(judged, "out"), 0.99),
        row("against views of learned subjects", detection(judged, "learned"), 0.98),
        row("against held-out pictures", detection(judged, "held out"), 0.99),
        row("of what is called, confirmed as stored by the twin", confirmed(judged), 0.98),
        row("of what is copied at the end, called", of_copied(judged, is_called), 0.97),
        row("called before the first event that shows a copy", of_copied(judged, is_before), 0.90),
        row("called at or before it", of_copied(judged, is_in_time), 0.97),
    ]
    rows += [row(f"mean IoU, regions of {n}", overlap(judged, lo, hi), bar) for n, (lo, hi, bar) in SIZES.items()]
    rows.append(row("mean rank correlation of heatmap and the twins' own map, copied items", agreement(judged)))
    rows.append(row("passes of a full look at one probe", float(passes.full), 32.0, most=True))
    rows.append(row("passes of the screen", float(passes.screen), 4.0, most=True))
    return rows


def row(name: str, found: Estimate | float | None, bar: float | None = None, most: bool = False) -> dict[str, Any]:
    """One line: the number, how many items it is of, its bar, and whether it is met."""
    value = found.value if isinstance(found, Estimate) else found
    met = None if value is None or bar is None else value <= bar if most else value >= bar
    items = found.count if isinstance(found, Estimate) and value is not None else None
    said = {True: "yes", False: "no", None: None}[met]
    asked = None if bar is None else f"{'<=' if most else '>='} {bar:g}"
    return {"number": name, "value": found, "items": items, "bar": asked, "met": said}


def one_subject_table(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Twins of one subject under one caption: the instances of a half, and views of the subject that it never saw."""
    rows = []
    for j in judged:
        own = j.product.run.planted
        views = [i for i in j.product.run.watched if i.kind in (*PLANTED, Kind.LEARNED) and i not in own]
        called = sorted(j.product.first_alert[i.name] for i in own if j.product.called(i))
        rows.append(
            {
                "run": j.product.run.name,
                "instances called": f"{len(called)} of {len(own)}",
                "stored, by the twin": sum(j.truth.is_stored(i, j.last) for i in own),
                "first call, median": int(np.median(called)) if called else None,
                "held-out views called": f"{sum(j.product.called(i) for i in views)} of {len(views)}",
            }
        )
    return rows


def kind_table(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """By kind of item: the twins' own gap, T in the middle and at the end, and who was called when."""
    rows = []
    for name, choose in kinds_of(judged).items():
        items = [(j, i) for j in judged for i in choose(j)]
        if not items:
            continue
        gaps = [j.truth.gap(i, j.last).mean for j, i in items]
        middle = [j.product.score(i, steps(j)[len(steps(j)) // 2]) for j, i in items]
        last = [j.product.score(i, j.last) for j, i in items]
        alerts = [j.product.first_alert[i.name] for j, i in items if j.product.called(i)]
        rows.append(
            {
                "items": name,
                "number": len(items),
                "gap, median": float(np.median(gaps)),
                "T in the middle": f"{np.median(middle):.1f} ({max(middle):.1f})",
                "T at the end": f"{np.median(last):.1f} ({max(last):.1f})",
                "suspicious": sum(i.name in j.product.first_suspicion for j, i in items),
                "called": len(alerts),
                "first call, median": int(np.median(alerts)) if alerts else None,
            }
        )
    return rows


def steps(j: Judged) -> list[int]:
    return list(j.product.events)


def kinds_of(judged: Sequence[Judged]) -> dict[str, Callable[[Judged], list[Item]]]:
    """How items are told apart on the page."""

    def own(kind: str) -> Callable[[Judged], list[Item]]:
        return lambda j: [i for i in j.product.run.watched if word(i) == kind and i.is_in(j.product.run.half)]

    def others(*kinds: Kind) -> Callable[[Judged], list[Item]]:
        return lambda j: [
            i for i in j.product.run.watched if i.kind in kinds and i.half not in ("", j.product.run.half)
        ]

    words = dict.fromkeys(word(i) for j in judged for i in j.product.run.watched if i.dose)
    found = {f"{w}, trained on": own(w) for w in words}
    found["planted and plain, of the other twin"] = others(*PLANTED, Kind.CONSTRAINED)
    found["learned views, of the other twin"] = others(Kind.LEARNED)
    found["ordinary, of the other twin"] = others(Kind.ORDINARY)
    found["never shown, of the same subject"] = lambda j: [
        i for i in j.product.run.watched if i.kind is Kind.LEARNED and not i.dose
    ]
    found["held out"] = lambda j: j.group("held out")
    return found


def word(item: Item) -> str:
    """``large-x12-a0`` is ``large``."""
    return str(item.kind) if item.kind in (Kind.LEARNED, Kind.ORDINARY) else item.name.split("-")[0]


def mistakes(judged: Sequence[Judged]) -> dict[str, list[str]]:
    """What was called and the twin does not confirm; what is copied and was never called, or late."""

    def named(j: Judged, item: Item) -> str:
        return f"{item.name} in {j.product.run.name} (step {j.product.first_alert.get(item.name, '-')})"

    return {
        "called, not confirmed": [named(j, i) for j in judged for i in j.called if not j.truth.is_stored(i, j.last)],
        "copied, never called": [named(j, i) for j in judged for i in j.copied if not is_called(j, i)],
        "copied, called late": [
            named(j, i) for j in judged for i in j.copied if is_called(j, i) and not is_in_time(j, i)
        ],
    }
