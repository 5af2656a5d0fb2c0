"""Worlds: the kinds of run that the benchmark makes, each with its own training set and plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memwatch.bench.items import Item, dreambooth_set, null_set, planted_set, without_captions
from memwatch.bench.protocol import LEVELS
from memwatch.config import LevelsConfig


@dataclass(frozen=True)
class Plan:
    """How a run trains. Events are optimizer steps at which everything is measured; 0 is before training."""

    steps: int = 1200
    events: tuple[int, ...] = (0, 200, 400, 800, 1200)
    batch_size: int = 32
    learning_rate: float = 7e-4
    lora_learning_rate: float = 3e-3
    lora_rank: int = 32
    prepare_steps: int = 300
    prepare_learning_rate: float = 2e-4


@dataclass(frozen=True)
class World:
    """One kind of run.

    Attributes:
        says: what it stands for, for the results page.
        items: the set of a seed.
        lora: whether a LoRA is trained and not the whole network.
        dropout: share of captions that are dropped in training.
        levels: at which its items are looked at.
        prompts: whether prompt probes and the published procedure are run as well.
    """

    says: str
    items: Callable[[int], list[Item]]
    plan: Plan = field(default_factory=Plan)
    lora: bool = False
    dropout: float = 0.0
    levels: LevelsConfig = LEVELS
    prompts: bool = True


WORLDS = {
    "full": World("many captions", planted_set),
    "dropout": World("10 % of captions dropped", planted_set, dropout=0.1),
    "uncaptioned": World("no captions", lambda seed: without_captions(planted_set(seed))),
    "lora": World(
        "many captions, LoRA", planted_set, Plan(steps=800, events=(0, 200, 400, 800)), lora=True, prompts=False
    ),
    "dreambooth": World(
        "six pictures, one caption", dreambooth_set, Plan(steps=600, events=(0, 75, 150, 300, 600), batch_size=4)
    ),
    "null": World(
        "nothing planted",
        null_set,
        Plan(steps=120, events=(0, 40, 80, 120), batch_size=8),
        levels=LevelsConfig(timesteps=(141, 301, 501, 701), draws=4),
    ),
}
