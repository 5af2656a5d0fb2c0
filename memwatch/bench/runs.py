"""Finished runs, read back: what was planted, what was measured at each event, and what had been stored by then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from memwatch.bench.items import PLANTED, Item, Kind, looked_at, planted_set
from memwatch.bench.look import LEVELS
from memwatch.curvature import CurvatureMap
from memwatch.probes import fixed_noise
from memwatch.signals import Measurement

COPY = 1 / 3  # of the distance to the nearest other picture


@dataclass(frozen=True)
class Finished:
    """One run on disk."""

    home: Path

    @cached_property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads((self.home / "run.json").read_text(encoding="utf-8"))
        return plan

    @property
    def name(self) -> str:
        return self.home.name

    @cached_property
    def items(self) -> list[Item]:
        return looked_at(planted_set(self.plan["seed"]))

    @cached_property
    def total_dose(self) -> int:
        return sum(item.dose for item in planted_set(self.plan["seed"]))

    @cached_property
    def steps(self) -> list[int]:
        """Measured events, the one before training first."""
        return sorted(int(file.stem.removeprefix("event_")) for file in self.home.glob("event_*.safetensors"))

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1] == self.plan["steps"]

    def tensors(self, step: int) -> dict[str, Tensor]:
        return _tensors(self.home / f"event_{step:05d}.safetensors")

    @cached_property
    def numbers(self) -> dict[int, dict[str, Any]]:
        return {
            step: json.loads((self.home / f"event_{step:05d}.json").read_text(encoding="utf-8")) for step in self.steps
        }

    def measurement(self, name: str, step: int) -> Measurement:
        """``name`` is an item's, or ``null/`` and an item's for the unconditional branch."""
        tensors = self.tensors(step)
        return Measurement(CurvatureMap(tensors[f"{name}/rho"]), tensors[f"{name}/epsilon"].float())

    def true_noise(self, name: str) -> Tensor:
        shape = (len(LEVELS.timesteps), LEVELS.draws, *self.tensors(self.steps[0])[f"{name}/epsilon"].shape[2:])
        return fixed_noise(name, shape, self.plan["seed"])

    def exposures(self, item: Item, step: int) -> float:
        """Expected showings of an item up to ``step``."""
        return float(step * self.plan["batch_size"] * item.dose / self.total_dose)

    def copied(self, item: Item, step: int) -> float:
        """Share of the generations that copy the item inside its mask."""
        ratios = self.numbers[step]["copy_ratio"].get(item.name, [np.inf])
        return float(np.mean(np.asarray(ratios) < COPY))

    @property
    def planted(self) -> list[Item]:
        return [item for item in self.items if item.kind in PLANTED]

    @cached_property
    def stored(self) -> list[Item]:
        """Planted items that at least half of the last event's generations copy."""
        return [item for item in self.planted if self.copied(item, self.steps[-1]) >= 0.5]

    def is_stored(self, item: Item) -> bool:
        return any(item.name == stored.name for stored in self.stored)

    def first_copy(self, item: Item) -> int | None:
        """The first event at which any generation is a copy."""
        return next((step for step in self.steps if self.copied(item, step) > 0), None)

    def of_kind(self, kind: Kind) -> list[Item]:
        return [item for item in self.items if item.kind is kind]


@lru_cache(maxsize=4)
def _tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def finished_runs(folder: Path) -> Iterator[Finished]:
    """Every complete run in ``folder``, by name."""
    for file in sorted(folder.glob("*/run.json")):
        run = Finished(file.parent)
        if run.is_complete:
            yield run
