"""Finished runs, read back: what was planted, and what was measured and generated at each event of both twins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from evidence.runs.protocol import DRAWS, event_file, probe_of
from evidence.worlds.items import PLANTED, Item, Kind, looked_at
from evidence.worlds.sets import HALVES
from evidence.worlds.world import WORLDS, World
from torch import Tensor

from memwatch.measure.measurement import Measurement, Observation, from_tensors
from memwatch.measure.probes import Probe
from memwatch.measure.views import fixed_noise
from memwatch.measure.weights import read_safetensors


@dataclass(frozen=True)
class Finished:
    """One run on disk: one of a pair of twins."""

    home: Path

    @cached_property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads((self.home / "run.json").read_text(encoding="utf-8"))
        return plan

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def half(self) -> str:
        return str(self.plan["half"])

    @property
    def world_name(self) -> str:
        return str(self.plan["world"])

    @property
    def world(self) -> World:
        return WORLDS[self.world_name]

    @cached_property
    def everything(self) -> list[Item]:
        """Both halves of the set, and what is held out from it."""
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
    def steps(self) -> list[int]:
        """Measured events, the one before training first."""
        return sorted(int(file.stem.removeprefix("event_")) for file in self.home.glob("event_*.json"))

    @property
    def last(self) -> int:
        return self.steps[-1]

    @property
    def is_complete(self) -> bool:
        return (self.home / "whole").is_file()

    @property
    def timesteps(self) -> tuple[int, ...]:
        return tuple(self.plan["timesteps"])

    @property
    def watched(self) -> list[Item]:
        """What memwatch is asked about."""
        return [item for item in self.items if item.kind is not Kind.CONTROL]

    @property
    def planted(self) -> list[Item]:
        """What this half was trained on, and may be copied."""
        return [item for item in self.items if item.kind in PLANTED and item.is_in(self.half)]

    # --- what was measured -------------------------------------------------------------------------------------------

    def tensors(self, step: int) -> Mapping[str, Tensor]:
        file = event_file(self.home, step)
        return _tensors(file, file.stat().st_mtime_ns)

    @cached_property
    def numbers(self) -> dict[int, dict[str, Any]]:
        """By step, the plain numbers of an event."""
        files = {step: event_file(self.home, step).with_suffix(".json") for step in self.steps}
        return {step: json.loads(file.read_text(encoding="utf-8")) for step, file in files.items()}

    def measurement(self, name: str, step: int) -> Measurement:
        """``name`` as ``event`` calls it.

        Raises:
            ValueError: it was not measured.
        """
        found = from_tensors(self.tensors(step), name)
        if found is None:
            raise ValueError(f"{self.home} has no measurement of {name} at step {step}")
        return found

    @lru_cache(maxsize=200)  # noqa: B019 - a run lives as long as the page that is made of it
    def true_noise(self, name: str) -> Tensor:
        """``(levels, draws, c, h, w)``"""
        shape = (len(self.timesteps), DRAWS, *self.measurement(name, self.steps[0]).epsilon.shape[2:])
        return fixed_noise(name, shape, self.plan["seed"])

    def observation(self, name: str, step: int) -> Observation:
        """An item at one event against the event before training, as memwatch's observer returns it."""
        first = self.steps[0]
        branch = f"null/{name}/epsilon" in self.tensors(step)
        return Observation(
            self.probes[name],
            self.timesteps,
            now=self.measurement(name, step),
            unconditional=self.measurement(f"null/{name}", step) if branch else None,
            baseline=self.measurement(name, first),
            unconditional_baseline=self.measurement(f"null/{name}", first) if branch else None,
            baseline_step=first,
            eps=self.true_noise(name),
            image=np.asarray(self.probes[name].image),
        )

    def generated(self, item: Item, step: int) -> np.ndarray | None:
        """What the item's caption generates, uint8 ``(n, SIZE, SIZE, 3)``; ``None`` where it was not asked."""
        tensors = self.tensors(step)
        keys = (f"{other.name}/generated" for other in self.items if other.caption == item.caption)
        return next((tensors[key].numpy() for key in keys if key in tensors), None)

    def target(self, item: Item) -> np.ndarray:
        """The item as the autoencoder gives it back, ``(SIZE, SIZE, 3)`` in [0, 1]."""
        found: np.ndarray = self.tensors(self.steps[0])[f"target/{item.name}"].double().numpy()
        return found

    def loss(self, item: Item, step: int) -> np.ndarray:
        """Denoising loss of an item on noise that memwatch never uses: ``(levels, draws, h, w)``."""
        found: np.ndarray = self.tensors(step)[f"truth/{item.name}"].double().numpy()
        return found


@dataclass(frozen=True)
class Pair:
    """Two twins: ``a`` and ``b`` were trained on the same set, but for what is in one half alone."""

    a: Finished
    b: Finished

    @property
    def name(self) -> str:
        return self.a.name[:-1]

    @property
    def runs(self) -> tuple[Finished, Finished]:
        return self.a, self.b

    def twin_of(self, run: Finished) -> Finished:
        return self.b if run.half == self.a.half else self.a


@lru_cache(maxsize=60)
def _tensors(file: Path, written: int) -> Mapping[str, Tensor]:
    """Read once, unless it is ``written`` again."""
    return read_safetensors(file)


def finished_runs(folder: Path) -> Iterator[Finished]:
    """Every complete run in ``folder``, by name."""
    runs = (Finished(file.parent) for file in sorted(folder.glob("*/run.json")))
    return (run for run in runs if run.is_complete)


def finished_pairs(folder: Path) -> Iterator[Pair]:
    """Every pair of twins of which both are complete."""
    runs = {run.name: run for run in finished_runs(folder)}
    for name, run in runs.items():
        twin = runs.get(f"{name[:-1]}{HALVES[1]}")
        if run.half == HALVES[0] and twin is not None:
            yield Pair(run, twin)
