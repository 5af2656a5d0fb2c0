"""Alternatives: what other floors and other patience would have called, on the very same evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evidence.runs.protocol import SHIPPED
from evidence.verdicts.product import Product, noted
from evidence.verdicts.tables import ALL, before_copy, by_world, called, precision, recall

from memwatch.config import AlertsConfig
from memwatch.judge.alerts import ProbeState, judge
from memwatch.judge.audit import audit_of
from memwatch.judge.findings import Finding, Judgement, capped

FLOORS, PATIENCES = (1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0), (1, 2)
WANTED = 0.95  # precision, where a rule is chosen


@dataclass(frozen=True)
class Choice:
    """``alerts.min_severity`` and ``alerts.patience``."""

    floor: float
    patience: int

    @property
    def rule(self) -> AlertsConfig:
        return replace(SHIPPED.alerts, min_severity=self.floor, patience=self.patience)

    def __str__(self) -> str:
        return f"{self.floor:g}x, {self.patience} event{'s' * (self.patience > 1)}"


SHIPPED_CHOICE = Choice(SHIPPED.alerts.min_severity, SHIPPED.alerts.patience)
CHOICES = tuple(Choice(floor, patience) for floor in FLOORS for patience in PATIENCES)


def judged_again(product: Product, rule: AlertsConfig) -> Product:
    """The same evidence under another rule for verdicts, controls and audit included."""
    found = Product(product.run, stop=product.stop)
    states: Mapping[str, ProbeState] = {}
    for step, event in product.events.items():
        controls, findings = (again(group, states, step, rule, product) for group in (event.controls, event.findings))
        audit = audit_of([f for f in controls if f.evidence.p is not None])
        findings = tuple(capped(f, audit, states.get(f.name, ProbeState())) for f in findings)
        states = {**states} | {f.name: f.state for f in (*findings, *controls)}
        noted(found, step, Judgement(findings, controls, event.peers, audit, states))
    return found


def again(
    group: Iterable[Finding], states: Mapping[str, ProbeState], step: int, rule: AlertsConfig, product: Product
) -> tuple[Finding, ...]:
    """Findings of one event, judged anew from what was remembered before it."""
    num_probes, planned = max(1, len(product.run.watched)), len(product.run.steps) - 1
    new = []
    for f in group:
        state, reason = judge(states.get(f.name, ProbeState()), f.evidence, step, rule, num_probes, planned)
        new.append(replace(f, state=state, reason=reason))
    return tuple(new)


def rejudged(products: Sequence[Product]) -> Mapping[Choice, list[Product]]:
    """Every run under every choice."""
    return {choice: [judged_again(p, choice.rule) for p in products] for choice in CHOICES}


def grid_table(everything: Mapping[Choice, Sequence[Product]]) -> list[dict[str, Any]]:
    """What every choice would have given on all runs."""
    rows = []
    for choice, products in everything.items():
        planted, nulls = ([p for p in products if bool(p.run.planted) is wanted] for wanted in (True, False))
        rows.append(
            {
                "floor, patience": f"**{choice}**" if choice == SHIPPED_CHOICE else str(choice),
                "recall": recall(planted),
                "precision": precision(planted),
                "called before the first copy": before_copy(planted),
                "runs with nothing planted that call": f"{sum(bool(called(p)) for p in nulls)}/{len(nulls)}",
            }
        )
    return rows


def chosen_elsewhere(everything: Mapping[Choice, Sequence[Product]]) -> list[dict[str, Any]]:
    """World by world: the choice that is best on the **other** worlds, and what it gives here.

    Best is the highest recall among those with a precision of ``WANTED``; where there is none, the highest precision.
    """
    worlds = {choice: by_world(products) for choice, products in everything.items()}
    shipped = worlds[SHIPPED_CHOICE]
    rows = []
    for world in (w for w in shipped if w != ALL):

        def merit(choice: Choice, world: str = world) -> tuple[bool, float, float]:
            others = [p for w, group in worlds[choice].items() if w not in (world, ALL) for p in group]
            found, right = recall(others).value or 0.0, precision(others).value or 0.0
            return (True, found, right) if right >= WANTED else (False, right, found)

        best = max(CHOICES, key=merit)
        here, there = worlds[best][world], shipped[world]
        rows.append(
            {
                "world": world,
                "chosen on the others": str(best),
                "recall": recall(here),
                "precision": precision(here),
                "called before the first copy": before_copy(here),
                "recall as shipped": recall(there),
                "precision as shipped": precision(there),
            }
        )
    return rows
