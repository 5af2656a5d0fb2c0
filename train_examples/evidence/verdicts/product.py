"""memwatch itself on a finished run: its own judge, event by event, on what its own screen had measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from evidence.runs.finished import Finished
from evidence.worlds.items import Item
from evidence.worlds.sources import SIZE
from memwatch.config import MemWatchConfig
from memwatch.judge.findings import Finding, Judgement, judge_event
from memwatch.judge.statistic import looks_of
from memwatch.judge.stop import StopState, decide_stop
from memwatch.judge.verdict import Verdict


@dataclass
class Product:
    """What memwatch said of one run.

    Attributes:
        events: by step, everything that it said.
        first_alert: by item, the step of its first ``memorized``. first_suspicion: of its first ``suspicious``.
        stop: the step at which it would have stopped the run; ``None`` where it would not.
    """

    run: Finished
    events: dict[int, Judgement] = field(default_factory=dict)
    first_alert: dict[str, int] = field(default_factory=dict)
    first_suspicion: dict[str, int] = field(default_factory=dict)
    stop: int | None = None

    @cached_property
    def findings(self) -> dict[str, dict[int, Finding]]:
        """By item and step."""
        found: dict[str, dict[int, Finding]] = {}
        for step, judgement in self.events.items():
            for f in judgement.everything:
                found.setdefault(f.name, {})[step] = f
        return found

    def called(self, item: Item) -> bool:
        """Whether it was called memorized at any event."""
        return item.name in self.first_alert

    def score(self, item: Item, step: int | None = None) -> float:
        """How far it stands out from the controls at an event, the last one by default, in predictive deviations."""
        f = self.findings[item.name][self.run.last if step is None else step]
        return f.evidence.z_score or 0.0

    def region(self, item: Item) -> np.ndarray | None:
        """What memwatch last lit up of an item, bool ``(SIZE, SIZE)``; ``None`` where it never did."""
        for step in reversed(self.events):
            f = self.findings[item.name][step]
            if f.verdict.is_evidence and f.labels is not None and (f.labels > 0).any():
                scale = SIZE // len(f.labels)
                region: np.ndarray = np.kron(f.labels > 0, np.ones((scale, scale), dtype=bool))
                return region
        return None


def judged(run: Finished, config: MemWatchConfig) -> Product:
    """Every event in turn, with the memory of those before."""
    product, stopping = Product(run), StopState()
    judgement = Judgement()
    for step in run.steps[1:]:
        observations, screened = run.as_shipped(step)
        looks = looks_of(sum(not o.probe.is_control for o in observations), 0, len(run.steps) - 1)
        judgement = judge_event(observations, judgement.states, step, config, judgement.pooled, looks, screened)
        product.events[step] = judgement
        for f in judgement.findings:
            if f.verdict is Verdict.MEMORIZED:
                product.first_alert.setdefault(f.name, step)
            if f.verdict.is_evidence:
                product.first_suspicion.setdefault(f.name, step)
        stopping = decide_stop(stopping, judgement.findings, step, config.stop)
        if stopping.reason is not None and product.stop is None:
            product.stop = step
    return product
