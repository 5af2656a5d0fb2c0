"""The items that memwatch and its rivals are compared on, each in its group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, state_of
from evidence.worlds.items import PLANTED, Item
from evidence.worlds.world import WORLDS

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
    found = []
    for product in products:
        for item in product.run.watched:
            state = state_of(product.run, item)
            if state is State.NEVER:
                found.append(Case(product, item, "planted" if item.kind in PLANTED else str(item.kind)))
            elif state is State.STORED:
                found.append(Case(product, item, STORED))
    return found


def worlds_of(cases: Sequence[Case]) -> list[str]:
    """The worlds that occur, in the order of ``world.WORLDS``."""
    return [name for name in WORLDS if any(case.world == name for case in cases)]
