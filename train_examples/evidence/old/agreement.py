"""Agreement: what a second rule for copies says of the same generations, and where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from evidence.old.by_rule import ByRule
from evidence.runs.finished import Finished
from evidence.verdicts.product import Product
from evidence.verdicts.stored import ENOUGH, is_fixed
from evidence.worlds.items import NOTHING, Item, Kind

from memwatch.measure.copies import COPY

ALL = "all"


@dataclass(frozen=True)
class Opinion:
    """Both rules on the generations of one item.

    Attributes:
        ratios: by the first rule, see ``measure.copies``; ``(n,)``.
        second: by the second, bool ``(n,)``.
        share: of the generations that the item could have, see ``Finished.share_of_caption``.
    """

    item: Item
    ratios: np.ndarray
    second: np.ndarray
    share: float

    @property
    def first(self) -> np.ndarray:
        """By the first rule, bool ``(n,)``."""
        found: np.ndarray = self.ratios < COPY
        return found

    def is_stored(self, copies: np.ndarray) -> bool:
        """Whether at least half of the generations that the item could have are copies, by either rule's list."""
        return bool(copies.mean() / self.share >= ENOUGH)


@dataclass(frozen=True)
class Compared:
    """One run by both rules, at its last event.

    Attributes:
        opinions: of every fixed item that is watched.
        false_copies: generations of held-out items that the second rule calls copies, bool. Each is judged inside the
            mask of a planted item, in turn, as similarity comes by chance more easily inside a small one.
    """

    run: Finished
    opinions: Sequence[Opinion]
    false_copies: np.ndarray


def compare_run(run: ByRule) -> Compared:
    """Both rules on one run; some seconds of one core."""
    ratios = run.numbers[run.last]["copy_ratio"]
    opinions = [
        Opinion(i, np.asarray(ratios[i.name]), run.copies(i, run.last), run.share_of_caption(i))
        for i in run.watched
        if is_fixed(i)
    ]
    masks = cycle([item.mask for item in run.planted] or [~NOTHING])
    held_out = zip(run.of_kind(Kind.HELD_OUT), masks, strict=False)
    false_copies = [run.copies_inside(item, run.last, mask) for item, mask in held_out]
    return Compared(run, opinions, np.concatenate(false_copies) if false_copies else np.zeros(0, dtype=bool))


# --- what both say ---------------------------------------------------------------------------------------------------


def second_states(compared: Compared) -> dict[str, bool]:
    """By item, whether it is stored by the second rule."""
    return {o.item.name: o.is_stored(o.second) for o in compared.opinions}


def agreement_table(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """How far both rules agree: one row per world, seeds pooled, and one of all."""
    worlds = list(dict.fromkeys(c.run.world_name for c in compared))
    rows = [agreement_row(world, [c for c in compared if c.run.world_name == world]) for world in worlds]
    return [*rows, agreement_row(ALL, compared)]


def agreement_row(world: str, compared: Sequence[Compared]) -> dict[str, Any]:
    """Items and generations on which both rules agree, and how often the second one is wrong on held-out items.

    Most generations are copies by neither rule, so that the share of those that either calls a copy is given as well.
    """
    opinions = [o for c in compared for o in c.opinions]
    states = [(o.is_stored(o.first), o.is_stored(o.second)) for o in opinions]
    copies = [pair for o in opinions for pair in zip(o.first, o.second, strict=True)]
    either = [first == second for first, second in copies if first or second]
    false = np.concatenate([np.zeros(0, dtype=bool), *(c.false_copies for c in compared)])
    return {
        "world": world,
        "items": len(states),
        "stored by both": states.count((True, True)),
        "by the region rule alone": states.count((True, False)),
        "by the second rule alone": states.count((False, True)),
        "by neither": states.count((False, False)),
        "generations": len(copies),
        "share that agrees": _mean([first == second for first, second in copies]),
        "copies by either rule": len(either),
        "share of them by both": _mean(either),
        "held-out generations": len(false),
        "share that the second rule calls copies": _mean(false),
    }


def called_table(compared: Sequence[Compared], products: Sequence[Product]) -> list[dict[str, Any]]:
    """What memwatch called, by what counts as stored: at the last event by either rule, by both, or by any of them.

    Only items that can be copied are counted; ``called, not stored`` are false by that definition alone.
    """
    said = {p.run.name: p for p in products}
    opinions = [(said[c.run.name], o) for c in compared for o in c.opinions]
    found = [(p.called(o.item), o.is_stored(o.first), o.is_stored(o.second)) for p, o in opinions]
    definitions: dict[str, Callable[[bool, bool], bool]] = {
        "the region rule": lambda first, second: first,
        "the second rule": lambda first, second: second,
        "both": lambda first, second: first and second,
        "either": lambda first, second: first or second,
    }
    rows = []
    for name, is_stored in definitions.items():
        pairs = [(called, is_stored(first, second)) for called, first, second in found]
        rows.append(
            {
                "stored by": name,
                "items": sum(stored for _, stored in pairs),
                "called": sum(called for called, stored in pairs if stored),
                "recall": _mean([called for called, stored in pairs if stored]),
                "called, not stored": sum(called for called, stored in pairs if not stored),
                "precision": _mean([stored for called, stored in pairs if called]),
            }
        )
    return rows


def disagreements(compared: Sequence[Compared]) -> list[str]:
    """Items that one rule alone calls stored, one line each."""
    return [
        f"{c.run.name} {o.item.name} ({o.item.mask.mean():.0%} of the picture): {said(o)}"
        for c in compared
        for o in c.opinions
        if o.is_stored(o.first) != o.is_stored(o.second)
    ]


def said(o: Opinion) -> str:
    """What both rules say of an item in words."""
    first, second = ("stored" if o.is_stored(copies) else "not stored" for copies in (o.first, o.second))
    return (
        f"{first} by the region rule with {o.first.sum()} copies of {len(o.ratios)} (median ratio "
        f"{np.median(o.ratios):.2f}), {second} by the second with {o.second.sum()}"
    )


def _mean(values: Sequence[bool] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
