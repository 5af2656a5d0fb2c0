"""Worlds: the kinds of run that the benchmark makes, each with its own base, training set and plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from evidence.worlds.bases import BASES, TINY_SD, Base
from evidence.worlds.items import Item
from evidence.worlds.sets import HALVES, duplicates, many_captions, marks, nothing, one_subject, without_captions
from evidence.worlds.sources import Source
from memwatch.config import MemWatchConfig

SHIPPED = MemWatchConfig()


@dataclass(frozen=True)
class Plan:
    """How each of a pair of twins trains, and at which noise levels it is looked at.

    The first event is before training, the others come ``every`` steps until the end. The learning rate falls to
    ``last_rate`` of itself at the end. ``curvature``: whether it is measured now and then, for the ablation.
    """

    steps: int = 800
    every: int = 40
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    last_rate: float = 0.1
    lora_rank: int = 32
    timesteps: tuple[int, ...] = SHIPPED.levels.timesteps
    curvature: bool = False

    @property
    def events(self) -> tuple[int, ...]:
        return tuple(range(0, self.steps + 1, self.every))


@dataclass(frozen=True)
class World:
    """One kind of run.

    Attributes:
        says: what it stands for, for the results page.
        make: the set of a seed, from what the base's source has.
        base: one of ``bases.BASES``.
        lora: whether a LoRA is trained and not the whole network.
        dropout: share of captions that are dropped in training.
        prompts: whether prompt probes are measured as well, at the end.
    """

    says: str
    make: Callable[[int, Source], list[Item]]
    plan: Plan = field(default_factory=Plan)
    base: str = TINY_SD
    lora: bool = False
    dropout: float = 0.0
    prompts: bool = False

    def items(self, seed: int) -> list[Item]:
        return self.make(seed, self.start.source())

    @property
    def halves(self) -> tuple[str, ...]:
        """Of a pair of twins; where nothing is planted one run says it all."""
        return HALVES[:1] if self.make is nothing else HALVES

    @property
    def start(self) -> Base:
        return BASES[self.base]


def uncaptioned(seed: int, source: Source) -> list[Item]:
    return without_captions(many_captions(seed, source))


LONGER = Plan(steps=1000, every=50)  # where it takes longer until something is copied
DREAMBOOTH = Plan(steps=1000, every=50, batch_size=4)
WORLDS = {
    "captions": World("many captions", many_captions, prompts=True),
    "lora": World("many captions, LoRA", many_captions, replace(LONGER, learning_rate=3e-3), lora=True),
    "dropout": World("10 % of captions dropped", many_captions, dropout=0.1),
    "uncaptioned": World("no captions", uncaptioned, LONGER),
    "marks": World("marks of 2 to 12 %", marks, LONGER, prompts=True),
    "dreambooth": World("six pictures, one caption", one_subject, DREAMBOOTH),
    "prior": World("six pictures, one caption, class pictures", partial(one_subject, prior=True), DREAMBOOTH),
    "pixels": World("unconditional, pixels, clothes", duplicates, base="pixels"),
    "velocity": World("another base: v-prediction, clothes", many_captions, base="velocity", prompts=True),
    "flow": World("another base: flow matching", many_captions, base="flow", prompts=True),
    "nothing": World("nothing planted", nothing, Plan(steps=240, every=12, batch_size=8)),
}
