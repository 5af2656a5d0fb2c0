"""Stops: what a run has copied, and what its held-out loss is, where memwatch or another rule would end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from evidence.rivals.rivals import held_out_loss
from evidence.runs.finished import Finished
from evidence.verdicts import intervals
from evidence.verdicts.product import Product
from evidence.verdicts.stored import first_copy
from evidence.verdicts.tables import by_world, stored
from evidence.worlds.items import PLANTED

PATIENCE = 2  # events in a row above the lowest loss
CLOSE = 1.02  # times the lowest loss: what counts as close to it


def z_score(run: Finished, step: int) -> float:
    """The loss at a step over the run's lowest at any event, the one before training included."""
    return held_out_loss(run, step) / min(held_out_loss(run, s) for s in run.steps)


def copies_by(run: Finished, step: int) -> int:
    """Items that any generation has copied by a step."""
    return sum((first_copy(run, item) or step + 1) <= step for item in run.watched)


def by_memwatch(product: Product) -> int | None:
    return product.stop


def by_validation_loss(product: Product) -> int | None:
    """The first event at which the held-out loss has been above its lowest so far ``PATIENCE`` times in a row."""
    run, streak = product.run, 0
    for i, step in enumerate(run.steps[1:], start=1):
        lowest = min(held_out_loss(run, s) for s in run.steps[:i])
        streak = streak + 1 if held_out_loss(run, step) > lowest else 0
        if streak >= PATIENCE:
            return step
    return None


def at_half(product: Product) -> int | None:
    """A fixed step: the event nearest to half of the run."""
    run = product.run
    return min(run.steps[1:], key=lambda step: abs(step - run.last / 2))


def never(product: Product) -> int | None:
    return None


RULES: dict[str, Callable[[Product], int | None]] = {
    "memwatch": by_memwatch,
    "validation loss": by_validation_loss,
    "half of the steps": at_half,
    "never": never,
}


def stop_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Of runs in which something is stored by their end: what each rule leaves; without a stop that is the end."""
    planted = [p for p in by_world(products)["all"] if any(i.kind in PLANTED for i in stored(p))]
    rows = []
    for name, rule in RULES.items():
        steps = [rule(p) for p in planted]
        ends = [p.run.last if step is None else step for p, step in zip(planted, steps, strict=True)]
        copied = [copies_by(p.run, end) for p, end in zip(planted, ends, strict=True)]
        losses = [z_score(p.run, end) for p, end in zip(planted, ends, strict=True)]
        rows.append(
            {
                "rule": name,
                "runs": len(planted),
                "stopped": sum(step is not None for step in steps),
                "share of the run trained, mean": float(
                    np.mean([e / p.run.last for p, e in zip(planted, ends, strict=True)])
                ),
                "nothing copied": intervals.share([[c == 0] for c in copied]),
                "items copied, mean": float(np.mean(copied)),
                "held-out loss over its lowest, mean": float(np.mean(losses)),
                "within 2 % of it": intervals.share([[loss <= CLOSE] for loss in losses]),
            }
        )
    return rows


def no_copies(products: Sequence[Product]) -> intervals.Estimate:
    """Share of the runs that memwatch stopped in which nothing had been copied by then."""
    stopped = [p for p in products if p.run.planted and p.stop is not None]
    return intervals.share([[copies_by(p.run, p.stop or 0) == 0] for p in stopped])


def close_to_lowest(products: Sequence[Product]) -> intervals.Estimate:
    """Share of the runs that memwatch stopped whose held-out loss was within 2 % of its lowest."""
    stopped = [p for p in products if p.run.planted and p.stop is not None]
    return intervals.share([[z_score(p.run, p.stop or 0) <= CLOSE] for p in stopped])
