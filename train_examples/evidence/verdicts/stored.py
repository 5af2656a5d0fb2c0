"""What a run's generations copy inside an item's mask, and when: by the run's end, where training goes on, or never."""

from __future__ import annotations

from enum import StrEnum

from evidence.runs.finished import Finished
from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import Product, judged
from evidence.worlds.items import Item, Kind

ENOUGH = 0.5  # of the generations that an item could have


class State(StrEnum):
    """Of an item at the end of a run."""

    STORED = "stored"  # copied by the run's last event, or at one before
    ON_ITS_WAY = "on its way"  # copied when training goes on
    NEVER = "never"


def copied_at(run: Finished, item: Item) -> int | None:
    """The first event at which at least half of the generations that could copy an item do."""
    steps = [*run.steps[1:], *run.later_steps]
    return next((step for step in steps if run.copied(item, step) >= ENOUGH), None)


def first_copy(run: Finished, item: Item) -> int | None:
    """The first event at which any generation is a copy."""
    return next((step for step in run.steps[1:] if run.copied(item, step) > 0), None)


def state_of(run: Finished, item: Item) -> State:
    step = copied_at(run, item) if is_fixed(item) else None
    if step is None:
        return State.NEVER
    return State.STORED if step <= run.last else State.ON_ITS_WAY


def stored_items(run: Finished) -> list[Item]:
    """Of what memwatch is asked about, what is stored by the run's end."""
    return [item for item in run.watched if state_of(run, item) is State.STORED]


def is_fixed(item: Item) -> bool:
    """Whether there is something that every showing of an item has in common, and that can be copied."""
    return bool(item.mask.any()) and item.dose > 0


def unfinished(run: Finished, product: Product | None = None) -> list[Item]:
    """What memwatch called memorized and the run's own events do not copy."""
    product = product or judged(run, SHIPPED)
    called = [item for item in run.watched if product.called(item) and item.kind is not Kind.HELD_OUT]
    return [item for item in called if state_of(run, item) is not State.STORED]
