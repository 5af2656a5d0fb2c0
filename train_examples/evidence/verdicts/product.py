"""memwatch itself on a finished run: its own screen and judge, event by event, on what was measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from evidence.runs.finished import Finished
from evidence.worlds.items import Item
from evidence.worlds.sources import SIZE
from memwatch.config import SCREEN_DRAWS, MemWatchConfig
from memwatch.judge.findings import Finding, Judgement, judge_event
from memwatch.judge.screen import chosen
from memwatch.judge.statistic import Screened
from memwatch.judge.verdict import ProbeState, Verdict
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation


@dataclass
class Product:
    """What memwatch said of one run.

    Attributes:
        events: by step, everything that it said.
        first_alert: by item, the step of its first ``memorized``. first_suspicion: of its first ``suspicious``.
    """

    run: Finished
    events: dict[int, Judgement] = field(default_factory=dict)
    first_alert: dict[str, int] = field(default_factory=dict)
    first_suspicion: dict[str, int] = field(default_factory=dict)

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

    def score(self, item: Item, step: int) -> float:
        """T at an event."""
        return self.findings[item.name][step].evidence.z_score or 0.0

    def region(self, item: Item, step: int) -> np.ndarray:
        """The regions of an item at an event, bool ``(SIZE, SIZE)``; nothing where there are none."""
        labels = self.findings[item.name][step].labels
        if labels is None:
            return np.zeros((SIZE, SIZE), dtype=bool)
        scale = SIZE // len(labels)
        found: np.ndarray = np.kron(labels > 0, np.ones((scale, scale), dtype=bool))
        return found


def judged(run: Finished, config: MemWatchConfig) -> Product:
    """Every event in turn, with the memory of those before. The full look at each eighth event is left out."""
    product = Product(run)
    states: Mapping[str, ProbeState] = {}
    looks = (len(run.steps) - 1) * len(run.watched)
    for step in run.steps[1:]:
        full = [restricted(run.observation(item.name, step), config) for item in run.items]
        judgement = judge_event(full, states, step, config, looks, screened_of(full, config))
        states = judgement.states
        product.events[step] = judgement
        for f in judgement.findings:
            if f.verdict is Verdict.MEMORIZED:
                product.first_alert.setdefault(f.name, step)
            if f.verdict.is_evidence:
                product.first_suspicion.setdefault(f.name, step)
    return product


def screened_of(full: list[Observation], config: MemWatchConfig) -> Screened:
    """What the screen would have seen of these observations, and chosen."""
    seen = [with_draws(o, SCREEN_DRAWS) for o in full]
    return Screened(seen, frozenset(chosen(seen, config)))


def restricted(o: Observation, config: MemWatchConfig) -> Observation:
    """An observation at the noise levels and draws of these settings alone."""
    places = [o.timesteps.index(t) for t in config.levels.timesteps]

    def part(m: Measurement) -> Measurement:
        """Curvature that was not kept is full freedom: where the loss decides, it changes nothing."""
        levels, draws, _, h, w = m.epsilon.shape
        rho = torch.ones(levels, draws, h, w) if m.rho is None else m.rho.samples
        return Measurement(CurvatureMap(rho[places]), m.epsilon[places, :wanted])

    assert o.eps is not None
    wanted = config.levels.draws
    parts = {name: part(m) for name, m in o.measurements.items()}
    return replace(o, timesteps=config.levels.timesteps, eps=o.eps[places, :wanted], **parts)


def with_draws(o: Observation, draws: int) -> Observation:
    """An observation as forward passes at the first noise draws see it."""
    assert o.eps is not None
    first = {name: Measurement(None, m.epsilon[:, :draws]) for name, m in o.measurements.items()}
    return replace(o, eps=o.eps[:, :draws], **first)
