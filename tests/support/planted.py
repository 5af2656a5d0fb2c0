"""A pair of twins as it lies on disk, made up: what is stored in which half is known, and the measurements say so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from evidence.runs.protocol import DRAWS, NUM_SEEDS, TRUTH, event_file
from evidence.runs.train import Run
from evidence.worlds.items import PLANTED, Item, Kind, looked_at
from evidence.worlds.world import WORLDS, Plan
from torch import Tensor

from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, to_tensors
from memwatch.measure.views import fixed_noise
from memwatch.measure.weights import write_safetensors

SIDE = 16
PLAN = Plan(steps=50, every=10)
STORED_FROM, COPIED_FROM = 10, 40  # steps
FALLEN = 4.0  # times less error inside the mask of what is stored
WATCHED = (*PLANTED, Kind.CONTROL, Kind.HELD_OUT)


def is_stored(item: Item, half: str) -> bool:
    """Whether a half has stored an item: all that is planted in it."""
    return item.kind in PLANTED and item.is_in(half)


def pretend(folder: Path, seed: int, world: str = "captions") -> None:
    """Both twins of a seed in ``folder``."""
    for half in "ab":
        run = Run(seed, world, half)
        home = folder / run.name
        home.mkdir(parents=True)
        plan = asdict(PLAN) | asdict(run) | {"commit": "made up"}
        (home / "run.json").write_text(json.dumps(plan), encoding="utf-8")
        items = looked_at(WORLDS[world].items(seed))
        for step in PLAN.events:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            write_safetensors(event_file(home, step), event(items, run, step, generator))
            event_file(home, step).with_suffix(".json").write_text(json.dumps({"step": step}), encoding="utf-8")
        (home / "whole").touch()


def event(items: list[Item], run: Run, step: int, generator: torch.Generator) -> dict[str, Tensor]:
    found: dict[str, Measurement] = {}
    tensors: dict[str, Tensor] = {}
    for item in items:
        stored = is_stored(item, run.half) and step >= STORED_FROM
        found[item.name] = measurement(item, run.seed, stored, generator)
        found[f"null/{item.name}"] = measurement(item, run.seed, False, generator)  # without the prompt nothing is
        tensors[f"truth/{item.name}"] = loss(item, stored, generator)
        picture = torch.from_numpy(np.asarray(item.probe).copy())
        if step == 0:
            tensors[f"target/{item.name}"] = (picture / 255).half()
        elif item.kind in PLANTED:
            other = torch.randint(0, 256, (NUM_SEEDS, 64, 64, 3), generator=generator, dtype=torch.uint8)
            copied = is_stored(item, run.half) and step >= COPIED_FROM
            tensors[f"{item.name}/generated"] = torch.stack([picture.byte()] * NUM_SEEDS) if copied else other
        if step == PLAN.steps and item.kind in (*PLANTED, Kind.HELD_OUT):
            looks = {"renoised": stored, "renoised_null": False, "renoised_first": False, "renoised_first_null": False}
            found |= {f"{k}/{item.name}": measurement(item, run.seed, s, generator) for k, s in looks.items()}
    return to_tensors({name: Measurement(m.rho, m.epsilon.half()) for name, m in found.items()}) | tensors


def fallen(item: Item, stored: bool) -> Tensor:
    """By what the error is multiplied, ``(h, w)``."""
    inside = torch.from_numpy(item.mask.reshape(SIDE, 4, SIDE, 4).mean((1, 3)) > 0.5)
    return torch.where(inside & torch.tensor(stored), 1 / FALLEN, 1.0)


def loss(item: Item, stored: bool, generator: torch.Generator) -> Tensor:
    levels, draws = len(TRUTH.timesteps), TRUTH.draws
    return 0.1 * fallen(item, stored) * (1 + 0.02 * torch.randn(levels, draws, SIDE, SIDE, generator=generator))


def measurement(item: Item, seed: int, stored: bool, generator: torch.Generator) -> Measurement:
    """Half of the freedom, and some error, ``FALLEN`` times less inside the mask of what is stored."""
    levels = len(PLAN.timesteps)
    eps = fixed_noise(item.name, (levels, DRAWS, 4, SIDE, SIDE), seed)
    error = 0.3 * fixed_noise(f"{item.name} error", eps.shape, seed) * fallen(item, stored).sqrt()
    noise = 1 + 0.02 * torch.randn(eps.shape, generator=generator)
    rho = CurvatureMap(torch.full((levels, DRAWS, SIDE, SIDE), 0.5))
    return Measurement(rho if item.mask.any() else None, eps + error * noise)
