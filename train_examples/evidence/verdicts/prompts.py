"""Prompt probes on twins: captions are watched, not pictures. What they generate is noised again and looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from evidence.metrics import auc
from evidence.runs.finished import Finished
from evidence.verdicts.product import restricted
from evidence.verdicts.truth import COPIED, Truth, nearest_quarter
from evidence.worlds.items import PLANTED, Item, Kind
from memwatch.config import MemWatchConfig
from memwatch.judge.statistic import Compared, compare, p_value
from memwatch.measure.measurement import Observation
from memwatch.measure.probes import Probe
from memwatch.proof.copies import distances

WAYS = {  # of deciding: the rule's own, and others
    "loss, min(S, N + relu(K - k0))": {},
    "loss, S alone": {"against": "snapshot"},
    "loss, N alone": {"against": "unconditional"},
    "variance, min(S, N + relu(K - k0))": {"terms": "variance"},
    "variance, S alone": {"terms": "variance", "against": "snapshot"},
    "variance, N alone": {"terms": "variance", "against": "unconditional"},
}


@dataclass(frozen=True)
class Prompts:
    """The captions of one of two twins at its last event. Controls are captions of held-out pictures."""

    truth: Truth

    @property
    def run(self) -> Finished:
        return self.truth.run

    @property
    def measured(self) -> bool:
        """Whether prompt probes were measured."""
        planted = self.run.planted
        return bool(planted) and f"renoised/{planted[0].name}/epsilon" in self.run.tensors(self.run.last)

    def observation(self, item: Item) -> Observation:
        """The item's caption, as memwatch observes a prompt probe against the event before training."""

        def at(kind: str) -> Any:
            return self.run.measurement(f"{kind}/{item.name}", self.run.last)

        return Observation(
            Probe(item.caption, name=item.name, is_control=item.kind is Kind.HELD_OUT),
            self.run.timesteps,
            now=at("renoised"),
            unconditional=at("renoised_null"),
            baseline=at("renoised_first"),
            unconditional_baseline=at("renoised_first_null"),
            baseline_step=self.run.steps[0],
            eps=self.run.true_noise(item.name),
        )

    @cached_property
    def observations(self) -> list[Observation]:
        return [self.observation(i) for i in self.run.items if i.kind in (*PLANTED, Kind.HELD_OUT)]

    def compared(self, config: MemWatchConfig) -> dict[str, Compared]:
        """T of every caption by name."""
        return compare([restricted(o, config) for o in self.observations], config.signals)

    @cached_property
    def groups(self) -> dict[str, list[Item]]:
        """Captions by what they generate: their own item or, of those never trained on, another or none."""
        planted = [item for item in self.run.items if item.kind in PLANTED]
        own = [item for item in planted if self.truth.is_copied(item)]
        unseen = [item for item in planted if not item.is_in(self.run.half)]
        alike = [item for item in unseen if self.brings_another(item)]
        return {
            "copied": own,
            "alike": alike,
            "other twin": [item for item in unseen if item not in alike],
            "held out": [item for item in self.run.items if item.kind is Kind.HELD_OUT],
        }

    def brings_another(self, caption: Item) -> bool:
        """Whether a caption that was never trained on generates what this twin, and not the other, was trained on.

        Of many items one is near by chance: it must be nearer than any is to the caption of a held-out picture.
        """
        return self.nearest(caption) > max(COPIED, self.chance)

    def nearest(self, caption: Item) -> float:
        """The largest ``nearness`` to anything that this twin was trained on."""
        return max(self.nearness(caption, item) for item in self.run.planted)

    @cached_property
    def chance(self) -> float:
        """The largest ``nearest`` of any caption of a held-out picture."""
        held_out = [i for i in self.run.items if i.kind is Kind.HELD_OUT]
        return max((self.nearest(i) for i in held_out if self.run.generated(i, self.run.last) is not None), default=0.0)

    def nearness(self, caption: Item, item: Item) -> float:
        """The graded copy of an item by the generations of another caption."""
        target, found = self.run.target(item)[None], []
        for run in (self.run, self.truth.twin):
            pictures = run.generated(caption, self.run.last)
            assert pictures is not None
            found.append(nearest_quarter(distances(target, pictures / 255, item.mask)[0]))
        return 1 - found[0] / found[1]


def prompt_table(truths: Sequence[Truth], config: MemWatchConfig) -> list[dict[str, Any]]:
    """One row for each way of deciding; empty where no prompt probes were measured."""
    measured = [prompts for prompts in map(Prompts, truths) if prompts.measured]
    if not measured:
        return []
    signals = {name: replace(config.signals, **way) for name, way in WAYS.items()}
    return [row(name, measured, replace(config, signals=changed)) for name, changed in signals.items()]


def row(name: str, measured: Sequence[Prompts], config: MemWatchConfig) -> dict[str, Any]:
    found: dict[str, list[Compared]] = {}
    for prompts in measured:
        compared = prompts.compared(config)
        for group, items in prompts.groups.items():
            found.setdefault(group, []).extend(compared[item.name] for item in items)
    scores = {group: [c.score or 0.0 for c in some] for group, some in found.items()}
    told: dict[str, Any] = {"map": name}
    for group in ("other twin", "held out"):
        told[f"AUC, {group}"] = auc(scores["copied"], scores[group]) if scores["copied"] and scores[group] else None
    for group, some in found.items():
        rare = sum(float(p_value(np.array(c.score), c.num_controls)) <= 0.01 for c in some if c.score is not None)
        told[f"p <= 0.01, {group}"] = f"{rare} of {len(some)}"
    return told
