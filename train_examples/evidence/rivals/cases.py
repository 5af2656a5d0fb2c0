"""Cases: the items that a comparison is made on, each in its group, and thresholds that other worlds have chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, state_of
from evidence.worlds.items import PLANTED, Item
from evidence.worlds.world import WORLDS

from memwatch.cli.metrics import threshold_at

STORED = "stored"
NEGATIVES = ("held out", "ordinary", "learned", "constrained", "planted")  # never copied, also when training goes on


@dataclass(frozen=True)
class Case:
    """One item of one run that counts.

    Attributes:
        group: ``STORED`` or one of ``NEGATIVES``.
    """

    product: Product
    item: Item
    group: str

    @property
    def world(self) -> str:
        return self.product.run.world_name

    @property
    def is_part(self) -> bool:
        """Whether a part of the picture is stored, and not all of it: what maps are judged by."""
        return self.group == STORED and not self.item.mask.all()


def cases_of(products: Sequence[Product]) -> list[Case]:
    """Everything that memwatch is asked about, run by run, but what is still on its way."""
    found = [(p, item, group_of(p, item)) for p in products for item in p.run.watched]
    return [Case(p, item, group) for p, item, group in found if group is not None]


def group_of(product: Product, item: Item) -> str | None:
    state = state_of(product.run, item)
    if state is State.NEVER:
        return "planted" if item.kind in PLANTED else str(item.kind)
    return STORED if state is State.STORED else None


def with_prompts(products: Sequence[Product]) -> list[Product]:
    """Runs of worlds in which the rivals that look at captions were measured."""
    return [p for p in products if p.run.world.prompts]


def worlds_of(cases: Sequence[Case]) -> list[str]:
    """The worlds that occur, in the order of ``worlds.WORLDS``."""
    return [name for name in WORLDS if any(case.world == name for case in cases)]


# --- scores ----------------------------------------------------------------------------------------------------------


def above_elsewhere(scores: np.ndarray, is_negative: np.ndarray, worlds: np.ndarray) -> np.ndarray | None:
    """Whether each score exceeds the threshold that the negatives of the *other* worlds choose, bool ``(n,)``.

    ``None`` where a world has no others with negatives.
    """
    above = np.zeros(len(scores), dtype=bool)
    for world in np.unique(worlds):
        here, elsewhere = worlds == world, scores[is_negative & (worlds != world)]
        if not len(elsewhere):
            return None
        above[here] = scores[here] > threshold_at(elsewhere)
    return above
