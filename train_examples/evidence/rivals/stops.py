"""What a run has copied, and what its held-out loss is, where memwatch or another rule would end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evidence.rivals.rivals import held_out_loss
from evidence.runs.finished import Finished
from evidence.verdicts import intervals
from evidence.verdicts.product import Product
from evidence.verdicts.stored import first_copy
from evidence.verdicts.tables import stored
from evidence.worlds.items import PLANTED

PATIENCE = 2  # events in a row above the lowest loss
CLOSE = 1.02  # times the lowest loss: what counts as close to it


def loss_excess(run: Finished, step: int) -> float:
    """The held-out loss at a step over the run's lowest at any event, the one before training included."""
    return held_out_loss(run, step) / min(held_out_loss(run, s) for s in run.steps)


def copies_by(run: Finished, step: int) -> int:
    """Items that any generation has copied by a step."""
    return sum((first_copy(run, item) or step + 1) <= step for item in run.watched)


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


RULES: dict[str, Callable[[Product], int | None]] = {
    "memwatch": lambda product: product.stop,
    "validation loss": by_validation_loss,
    "half of the steps": at_half,
    "never": lambda product: None,
}


def stop_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Of runs in which something is stored by their end: what each rule leaves; without a stop that is the end."""
    planted = [p for p in products if any(i.kind in PLANTED for i in stored(p))]
    rows = []
    for name, rule in RULES.items():
        steps = [rule(p) for p in planted]
        ends = [(p.run, p.run.last if step is None else step) for p, step in zip(planted, steps, strict=True)]
        copied = [copies_by(run, end) for run, end in ends]
        losses = [loss_excess(run, end) for run, end in ends]
        rows.append(
            {
                "rule": name,
                "runs": len(planted),
                "stopped": sum(step is not None for step in steps),
                "share of the run trained, mean": mean_of([end / run.last for run, end in ends]),
                "nothing copied": intervals.share([[c == 0] for c in copied]),
                "items copied, mean": mean_of(copied),
                "held-out loss over its lowest, mean": mean_of(losses),
                "within 2 % of it": intervals.share([[loss <= CLOSE] for loss in losses]),
            }
        )
    return rows


def mean_of(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
