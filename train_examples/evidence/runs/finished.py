"""Finished runs, read back: what was planted, what was measured at each event, and what had been copied by then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from evidence.runs.protocol import LEVELS, event_file, later_file, probe_of
from evidence.worlds.items import PLANTED, Item, Kind, looked_at
from evidence.worlds.world import WORLDS, World
from torch import Tensor

from memwatch.judge.screen import with_references
from memwatch.judge.statistic import Screened
from memwatch.judge.copied import COPY
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
    def world_name(self) -> str:
        return str(self.plan["world"])

    @property
    def world(self) -> World:
        return WORLDS[self.world_name]

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
        return {item.name: probe_of(item) for item in self.items}

    @cached_property
    def total_dose(self) -> int:
        return sum(item.dose for item in self.everything)

    @cached_property
    def steps(self) -> list[int]:
        """Measured events, the one before training first."""
        return steps_of(self.home, "event")

    @cached_property
    def later_steps(self) -> list[int]:
        """Where a run that went on was generated from again; often none."""
        return steps_of(self.home, "later")

    @property
    def last(self) -> int:
        return self.steps[-1]

    @property
    def is_complete(self) -> bool:
        return bool(self.steps) and self.last == self.plan["steps"] and (self.home / "whole").is_file()

    # --- what was measured -------------------------------------------------------------------------------------------

    def tensors(self, step: int) -> Mapping[str, Tensor]:
        """Of an event, or of what came later."""
        file = event_file(self.home, step) if step <= self.plan["steps"] else later_file(self.home, step)
        return _tensors(file, file.stat().st_mtime_ns)

    @cached_property
    def numbers(self) -> dict[int, dict[str, Any]]:
        """By step, the plain numbers of an event, and of what came later."""
        files = {step: event_file(self.home, step) for step in self.steps}
        files |= {step: later_file(self.home, step) for step in self.later_steps}
        return {step: json.loads(f.with_suffix(".json").read_text(encoding="utf-8")) for step, f in files.items()}

    def measurement(self, name: str, step: int) -> Measurement:
        """``name`` as ``event`` calls it.

        Raises:
            ValueError: it was not measured.
        """
        found = from_tensors(self.tensors(step), name)
        if found is None:
            raise ValueError(f"{self.home} has no measurement of {name} at step {step}")
        return found

    def has(self, name: str, step: int) -> bool:
        return f"{name}/epsilon" in self.tensors(step)

    def true_noise(self, name: str) -> Tensor:
        """``(levels, draws, c, h, w)``"""
        shape = (len(LEVELS.timesteps), LEVELS.draws, *self.measurement(name, self.steps[0]).epsilon.shape[2:])
        return fixed_noise(name, shape, self.plan["seed"])

    def observation(self, name: str, step: int, curvature: bool) -> Observation:
        """An item at one event against the event before training, as memwatch's observer would have returned it.

        Args:
            curvature: whether with everything, or as the screen sees it.
        """
        first, prefix = self.steps[0], "" if curvature else "screen/"
        branch = self.has(f"{prefix}null/{name}", step)

        def of(name: str, step: int) -> Measurement:
            return self.measurement(f"{prefix}{name}", step)

        now = of(name, step)
        return Observation(
            self.probes[name],
            LEVELS.timesteps,
            now=now,
            unconditional=of(f"null/{name}", step) if branch else None,
            baseline=of(name, first),
            unconditional_baseline=of(f"null/{name}", first) if branch else None,
            baseline_step=first,
            eps=self.true_noise(name)[:, : now.draws],
            image=np.asarray(self.probes[name].image),
        )

    def measured(self, step: int) -> set[str]:
        """The names of those whose curvature memwatch measured: what its screen chose, and what that is judged by."""
        return with_references(self.numbers[step]["chosen"], list(self.probes.values()))

    def as_shipped(self, step: int) -> tuple[list[Observation], Screened]:
        """What memwatch would have judged an event by: curvature of what it measured, and what its screen saw.

        At events that are measured in full there is curvature of everything.
        """
        names, measured = [item.name for item in self.items], self.measured(step)
        screened = [self.observation(name, step, False) for name in names]
        chosen = frozenset(self.numbers[step]["chosen"])
        return [self.observation(name, step, name in measured) for name in names], Screened(screened, chosen)

    def generated(self, item: Item, step: int) -> np.ndarray:
        """What the item's caption generates, uint8 ``(n, SIZE, SIZE, 3)``."""
        tensors = self.tensors(step)
        keys = (f"{other.name}/generated" for other in self.items if other.caption == item.caption)
        found: np.ndarray = next(tensors[key] for key in keys if key in tensors).numpy()
        return found

    # --- what was copied ---------------------------------------------------------------------------------------------

    def exposures(self, item: Item, step: int) -> float:
        """Expected showings of an item up to ``step``."""
        return float(step * self.plan["batch_size"] * item.dose / self.total_dose)

    def share_of_caption(self, item: Item) -> float:
        """In what share of its caption's generations a model that has stored everything would show the item."""
        same = sum(i.dose for i in self.everything if i.caption == item.caption)
        return item.dose / same if same else 1.0

    def copied(self, item: Item, step: int) -> float:
        """Generations of the item's caption that copy it inside its mask, relative to its share of the caption; <= 1.

        A caption of its own is an item's whole share. Where six pictures share one, a model that has stored them all
        copies each in a sixth of its generations. What is never shown cannot be copied, but come near by chance.
        """
        copies = self.copies(item, step) if item.dose else np.zeros(0)
        return min(1.0, float(copies.mean()) / self.share_of_caption(item)) if len(copies) else 0.0

    def copies(self, item: Item, step: int) -> np.ndarray:
        """Which generations of the item's caption copy it, bool ``(n,)``; empty where nothing was generated."""
        ratios: Sequence[float] = self.numbers[step].get("copy_ratio", {}).get(item.name, ())
        return np.asarray(ratios) < COPY

    def of_kind(self, *kinds: Kind) -> list[Item]:
        return [item for item in self.items if item.kind in kinds]

    @property
    def planted(self) -> list[Item]:
        return self.of_kind(*PLANTED)

    @property
    def watched(self) -> list[Item]:
        """What memwatch is asked about: everything but the controls."""
        return [item for item in self.items if item.kind is not Kind.CONTROL]


def steps_of(home: Path, kind: str) -> list[int]:
    return sorted(int(file.stem.removeprefix(f"{kind}_")) for file in home.glob(f"{kind}_*.safetensors"))


@lru_cache(maxsize=10)
def _tensors(file: Path, written: int) -> Mapping[str, Tensor]:
    """Read once, unless it is ``written`` again."""
    return read_safetensors(file)


def finished_runs(folder: Path) -> Iterator[Finished]:
    """Every complete run in ``folder``, by name."""
    runs = (Finished(file.parent) for file in sorted(folder.glob("*/run.json")))
    return (run for run in runs if run.is_complete)
