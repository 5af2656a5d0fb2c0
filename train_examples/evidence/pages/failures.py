"""Failures: what memwatch called and nobody copies, and what is stored and it called too late or never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from evidence.verdicts.product import Product
from evidence.verdicts.stored import State, first_copy, state_of
from evidence.worlds.items import Item

from memwatch.judge.findings import Finding


class Mistake(StrEnum):
    """Worst first."""

    FALSE_CALL = "false call"  # called memorized, and never copied, also where training goes on
    NEVER_CALLED = "never called"  # stored, and never called memorized
    LATE = "late"  # stored, and called memorized at a later event than that of its first copy


@dataclass(frozen=True)
class Failure:
    """One item that memwatch was wrong about.

    Attributes:
        step: of the event that shows the mistake: the false call, the run's last event, the first copy.
    """

    product: Product
    item: Item
    mistake: Mistake
    step: int

    @property
    def finding(self) -> Finding:
        """What memwatch said at that event."""
        return self.product.findings[self.item.name][self.step]

    @property
    def words(self) -> str:
        """What is known of it."""
        when = {
            Mistake.FALSE_CALL: f"False call: at step {self.step}",
            Mistake.NEVER_CALLED: "Never called: at the last event",
            Mistake.LATE: "Called after its first copy: at that copy",
        }[self.mistake]
        return f"{when} memwatch said {self.finding.verdict} ({self.finding.reason})."

    @property
    def rank(self) -> tuple[int, float]:
        """For sorting, worst first: false calls by severity, what was never called by dose, the rest by the delay."""
        run = self.product.run
        if self.mistake is Mistake.FALSE_CALL:
            weight = self.finding.severity
        elif self.mistake is Mistake.NEVER_CALLED:
            weight = float(self.item.dose)
        else:
            called = run.exposures(self.item, self.product.first_alert[self.item.name])
            weight = called - run.exposures(self.item, self.step)
        return list(Mistake).index(self.mistake), -weight


def failures_of(products: Sequence[Product]) -> list[Failure]:
    """Of all runs, worst first."""
    found = [failure_of(product, item) for product in products for item in product.run.watched]
    return sorted((failure for failure in found if failure is not None), key=lambda failure: failure.rank)


def failure_of(product: Product, item: Item) -> Failure | None:
    """``None`` where memwatch was right: also of what is on its way, called or not."""
    run, alert = product.run, product.first_alert.get(item.name)
    state = state_of(run, item)
    if state is State.NEVER:
        return None if alert is None else Failure(product, item, Mistake.FALSE_CALL, alert)
    if state is State.ON_ITS_WAY:
        return None
    if alert is None:
        return Failure(product, item, Mistake.NEVER_CALLED, run.last)
    copy = first_copy(run, item)
    return None if copy is None or alert <= copy else Failure(product, item, Mistake.LATE, copy)
