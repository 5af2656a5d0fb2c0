"""Finished runs, read back: what was planted, what was measured at each event, and what had been stored by then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwatch.bench.items import PLANTED, Item, Kind, looked_at
from memwatch.bench.protocol import RENOISED, SEED_DRAWS, event_file
from memwatch.bench.worlds import WORLDS, World
from memwatch.config import SignalsConfig
from memwatch.measure.baselines import choose_baseline
from memwatch.measure.copies import COPY
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, Observation, from_tensors
from memwatch.measure.probes import Probe
from memwatch.measure.views import fixed_noise
from memwatch.measure.weights import read_safetensors


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

    @property
    def world(self) -> World:
        return WORLDS[self.plan["world"]]

    @cached_property
    def everything(self) -> list[Item]:
        """The whole set, and what is held out from it."""
        return self.world.items(self.plan["seed"])

    @cached_property
    def items(self) -> list[Item]:
        """What is looked at."""
        return looked_at(self.everything)

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """Items as memwatch knows them, by name."""
        return {i.name: Probe(i.caption, i.probe, 0, i.name, is_control=i.kind is Kind.CONTROL) for i in self.items}

    @cached_property
    def total_dose(self) -> int:
        return sum(item.dose for item in self.everything)

    @cached_property
    def steps(self) -> list[int]:
        """Measured events, the one before training first."""
        return sorted(int(file.stem.removeprefix("event_")) for file in self.home.glob("event_*.safetensors"))

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.steps[-1] == self.plan["steps"]

    @cached_property
    def has_prompts(self) -> bool:
        """Whether prompt probes and the published procedure were run as well."""
        return any(name.startswith("renoised/") for name in self.tensors(self.steps[-1]))

    # --- what was measured -------------------------------------------------------------------------------------------

    def tensors(self, step: int) -> dict[str, Tensor]:
        return _tensors(event_file(self.home, step))

    @cached_property
    def numbers(self) -> dict[int, dict[str, Any]]:
        """By step, the plain numbers of an event."""
        files = {step: event_file(self.home, step).with_suffix(".json") for step in self.steps}
        return {step: json.loads(file.read_text(encoding="utf-8")) for step, file in files.items()}

    def measurement(self, name: str, step: int) -> Measurement:
        """``name`` is an item's, or ``null/`` and an item's for the unconditional branch.

        Raises:
            ValueError: it was not measured.
        """
        found = from_tensors(self.tensors(step), name)
        if found is None:
            raise ValueError(f"{self.home} has no measurement of {name} at step {step}")
        return found

    def true_noise(self, name: str) -> Tensor:
        levels = self.world.levels
        shape = (len(levels.timesteps), levels.draws, *self.tensors(self.steps[0])[f"{name}/epsilon"].shape[2:])
        return fixed_noise(name, shape, self.plan["seed"])

    def observation(
        self,
        name: str,
        step: int,
        earlier: int | None,
        draws: int | None = None,
        timesteps: Sequence[int] | None = None,
        unconditional: bool = True,
    ) -> Observation:
        """An item at one event, as memwatch's observer would have returned it.

        Args:
            earlier: the event to compare with; ``None`` is the item's caption as a prompt probe, at the last step of
                its generation (timestep 1), compared with the starting weights.
            unconditional: whether the branch is part of it. Where the item has no caption it never is.
        """
        if earlier is None:
            keys = ("prompt", "prompt_null", "prompt_first")
            now, null, first = (self.measurement(f"{key}/{name}", step) for key in keys)
            return Observation(Probe(self.probes[name].prompt, name=name), (1,), now, null, first, self.steps[0])
        timesteps, draws = timesteps or self.world.levels.timesteps, draws or self.world.levels.draws
        levels = [self.world.levels.timesteps.index(t) for t in timesteps]

        def taken(name: str, step: int) -> Measurement:
            return self.measurement(name, step).at_levels(levels).first_draws(draws)

        branch = unconditional and bool(self.probes[name].prompt)
        return Observation(
            self.probes[name],
            tuple(timesteps),
            now=taken(name, step),
            unconditional=taken(f"null/{name}", step) if branch else None,
            baseline=taken(name, earlier),
            unconditional_baseline=taken(f"null/{name}", earlier) if branch else None,
            baseline_step=earlier,
            eps=self.true_noise(name)[levels][:, :draws],
            image=np.asarray(self.probes[name].image),
        )

    def prompt_observation(self, name: str, step: int, seeds: int, is_control: bool) -> Observation:
        """A caption as a prompt probe whose generations are noised again, compared with the starting weights.

        Args:
            seeds: generations that are pooled, 1, 2 or 4; together they have as many noise draws.
        """
        draws = max(SEED_DRAWS) // seeds

        def pooled(key: str) -> Measurement:
            parts = [self.measurement(f"{key}/{name}/{seed}", step).first_draws(draws) for seed in range(seeds)]
            rho = torch.cat([part.measured_rho.samples for part in parts], dim=1)
            return Measurement(CurvatureMap(rho), torch.cat([part.epsilon for part in parts], dim=1))

        now, channels = pooled("renoised"), self.tensors(self.steps[0])[f"{self.items[0].name}/epsilon"].shape[2:]
        eps = [
            fixed_noise(f"{name}/{seed}", (len(RENOISED), SEED_DRAWS[seed], *channels), self.plan["seed"])[:, :draws]
            for seed in range(seeds)
        ]
        return Observation(
            Probe(name, name=name, is_control=is_control),
            RENOISED,
            now=now,
            unconditional=pooled("renoised_null"),
            baseline=pooled("renoised_first"),
            unconditional_baseline=pooled("renoised_first_null"),
            baseline_step=self.steps[0],
            eps=torch.cat(eps, dim=1),
        )

    def earlier_step(self, signals: SignalsConfig, step: int, last_clean: int | None = None) -> int:
        """The event that a configured baseline means, see ``choose_baseline``. The first event is its own baseline.

        Raises:
            ValueError: the baseline is no event of the run.
        """
        if signals.baseline_is_fixed:
            allowed = "first, previous, lag:N, last_clean"
            raise ValueError(f"the benchmark did not measure the baseline {signals.baseline!r}; it knows {allowed}")
        found = choose_baseline(signals, [s for s in self.steps if s < step], last_clean)
        return self.steps[0] if found is None else found

    # --- what was stored ---------------------------------------------------------------------------------------------

    def exposures(self, item: Item, step: int) -> float:
        """Expected showings of an item up to ``step``."""
        return float(step * self.plan["batch_size"] * item.dose / self.total_dose)

    def copied(self, item: Item, step: int) -> float:
        """Generations of the item's caption that copy it inside its mask, relative to its share of the caption; <= 1.

        A caption of its own is an item's whole share. Where six pictures share one, a model that has stored them all
        copies each in a sixth of its generations.
        """
        ratios = self.numbers[step]["copy_ratio"].get(item.name, [np.inf])
        share = item.dose / max(1, sum(i.dose for i in self.everything if i.caption == item.caption))
        return min(1.0, float(np.mean(np.asarray(ratios) < COPY)) / share) if item.dose else 0.0

    @property
    def planted(self) -> list[Item]:
        return [item for item in self.items if item.kind in PLANTED]

    @cached_property
    def stored(self) -> list[Item]:
        """Planted items that the last event's generations copy at least half as often as they could, see ``copied``."""
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
    return read_safetensors(file)


def finished_runs(folder: Path) -> Iterator[Finished]:
    """Every complete run in ``folder``, by name."""
    runs = (Finished(file.parent) for file in sorted(folder.glob("*/run.json")))
    return (run for run in runs if run.is_complete)
