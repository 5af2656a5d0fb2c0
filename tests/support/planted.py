"""A benchmark run as it lies on disk, made up: who is stored is known, and the measurements say so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from evidence.runs.event import GUIDED, PROMPTED
from evidence.runs.protocol import LEVELS, NUM_SEEDS, event_file, later_file
from evidence.runs.train import Run
from evidence.verdicts.stored import is_fixed
from evidence.worlds.items import Item, looked_at
from evidence.worlds.sets import MODERATE, STRONG
from evidence.worlds.world import WORLDS, Plan
from torch import Tensor

from memwatch.config import SCREEN_DRAWS
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, to_tensors
from memwatch.measure.views import fixed_noise
from memwatch.measure.weights import write_safetensors

SIDE = 16
STEPS = (0, 10, 20, 30, 40)
COPIED_FROM = 30  # by then generations of what is stored are copies; in memwatch's measurements it shows from 10 on
LATER = 60
FALLEN = 4.0  # times less freedom, and less error, inside the mask of what is stored


def is_stored(item: Item) -> bool:
    """Items drawn often: the strong ones are copied at ``COPIED_FROM``, the moderate ones at ``LATER`` only."""
    return is_fixed(item) and item.dose in (STRONG, MODERATE)


def pretend(home: Path, seed: int, world: str = "captions") -> None:
    """A finished run in which the strongly and moderately dosed items are stored."""

    def write(file: Path, tensors: dict[str, Tensor], numbers: dict) -> None:
        write_safetensors(file, tensors)
        file.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")

    home.mkdir(parents=True)
    plan = asdict(Plan(steps=STEPS[-1], events=STEPS)) | asdict(Run(seed, world)) | {"commit": "made up"}
    (home / "run.json").write_text(json.dumps(plan), encoding="utf-8")
    items = looked_at(WORLDS[world].items(seed))
    for step in STEPS:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        write(event_file(home, step), *event(items, seed, step, generator))
    if moderate := {i.name: [0.2] * NUM_SEEDS for i in items if is_stored(i) and i.dose == MODERATE}:
        later = {f"{name}/generated": torch.zeros(NUM_SEEDS, 64, 64, 3, dtype=torch.uint8) for name in moderate}
        write(later_file(home, LATER), later, {"copy_ratio": moderate, "nearest_ratio": moderate})
    (home / "whole").touch()


def event(items: list[Item], seed: int, step: int, generator: torch.Generator) -> tuple[dict[str, Tensor], dict]:
    found: dict[str, Measurement] = {}
    tensors: dict[str, Tensor] = {}
    ratios: dict[str, list[float]] = {}
    for item in items:
        fallen = is_stored(item) and step > 0
        now = measurement(item, seed, fallen, generator)
        without = measurement(item, seed, False, generator)  # without the prompt nothing is stored
        screened = [Measurement(None, m.epsilon[:, :SCREEN_DRAWS]) for m in (now, without)]
        found |= {item.name: now, f"screen/{item.name}": screened[0]}
        if item.caption:
            found |= {f"null/{item.name}": without, f"screen/null/{item.name}": screened[1]}
        if step:
            copied = is_stored(item) and item.dose == STRONG and step >= COPIED_FROM
            ratios[item.name] = [0.2 if copied else 0.9] * NUM_SEEDS
            picture = torch.from_numpy(np.asarray(item.probe).copy()) if copied else torch.full((64, 64, 3), 128)
            tensors[f"{item.name}/generated"] = torch.stack([picture.byte()] * NUM_SEEDS)
        if step == STEPS[-1]:
            for how in GUIDED:
                for key in ("snapshot", "null", "score", "score_null"):
                    tensors[f"{item.name}/{how}/{key}"] = torch.rand(SIDE, SIDE, generator=generator)
                tensors[f"{item.name}/{how}/bright_ending"] = torch.rand(8, 8, generator=generator)
            if item.kind in PROMPTED:
                for key in ("renoised", "renoised_null", "renoised_first", "renoised_first_null"):
                    found[f"{key}/{item.name}"] = measurement(item, seed, fallen and key == "renoised", generator)
    # what memwatch's screen would choose, and some more, as chance has it
    chosen = [item.name for i, item in enumerate(items) if is_stored(item) or i % 3 == 0]
    numbers = {"step": step, "seconds": 1.0, "chosen": chosen}
    numbers |= {"copy_ratio": ratios, "nearest_ratio": ratios} if step else {}
    numbers |= {
        f"wen {how}": {item.name: float(torch.rand(1, generator=generator)) for item in items} for how in GUIDED
    }
    halved = {name: Measurement(m.rho, m.epsilon.half()) for name, m in found.items()}
    return to_tensors(halved) | tensors, numbers


def measurement(item: Item, seed: int, fallen: bool, generator: torch.Generator) -> Measurement:
    """Half of the freedom, and some error; both ``FALLEN`` times less inside the mask."""
    levels, draws = len(LEVELS.timesteps), LEVELS.draws
    inside = torch.from_numpy(item.mask.reshape(SIDE, 4, SIDE, 4).mean((1, 3)) > 0.5)
    factor = torch.where(inside & torch.tensor(fallen), 1 / FALLEN, 1.0)
    rho = 0.5 * factor * (1 + 0.02 * torch.randn(levels, draws, SIDE, SIDE, generator=generator))
    eps = fixed_noise(item.name, (levels, draws, 4, SIDE, SIDE), seed)
    error = 0.3 * fixed_noise(f"{item.name} error", eps.shape, seed) * factor.sqrt()
    return Measurement(CurvatureMap(rho), eps + error * (1 + 0.02 * torch.randn(eps.shape, generator=generator)))
