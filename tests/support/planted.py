"""A benchmark run as it lies on disk, made up: who is stored is known, and the measurements say so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from memwatch.bench.items import PLANTED, looked_at, planted_set
from memwatch.bench.protocol import LEVELS, PROMPT_DRAWS, RENOISED, SEED_DRAWS, prompt_probes
from memwatch.bench.train import Run
from memwatch.bench.worlds import Plan
from memwatch.config_file import load_config
from memwatch.measure.curvature import CurvatureMap
from memwatch.measure.measurement import Measurement, to_tensors
from memwatch.measure.weights import write_safetensors

SIDE = 16
STEPS = (0, 10, 20, 30)
CHOSEN = load_config(
    None, screen=False, levels={"timesteps": [61, 141, 301], "draws": 8}, curvature={"vectors": 1, "tile": 4}
)


def pretend(home: Path, seed: int) -> None:
    """A finished run in which the items of dose 32 and 64 are stored.

    Inside their masks there is five times less freedom from step 10 on, and from step 20 on they are copied.
    """
    home.mkdir(parents=True)
    plan = asdict(Plan(steps=STEPS[-1], events=STEPS)) | asdict(Run(seed, "full"))
    (home / "run.json").write_text(json.dumps(plan), encoding="utf-8")
    items = looked_at(planted_set(seed))
    levels, draws = len(LEVELS.timesteps), LEVELS.draws
    for step in STEPS:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        measured, tensors, ratios = {}, {}, {}
        for item in items:
            stored = item.kind in PLANTED and item.dose >= 32
            inside = torch.from_numpy(item.mask.reshape(SIDE, 4, SIDE, 4).mean((1, 3)) > 0.5)
            rho = torch.full((levels, draws, SIDE, SIDE), 0.5)
            rho[..., inside] /= 5 if stored and step > 0 else 1
            rho *= 1 + 0.02 * torch.randn(rho.shape, generator=generator)
            eps = torch.zeros(levels, draws, 4, SIDE, SIDE) + 0.01 * torch.randn(4, SIDE, SIDE, generator=generator)
            free = torch.full((levels, draws, SIDE, SIDE), 0.5)  # without the prompt nothing is stored
            measured[item.name] = Measurement(CurvatureMap(rho), eps.half())
            measured[f"null/{item.name}"] = Measurement(CurvatureMap(free), eps.half())
            of_prompt = {key: torch.full((1, PROMPT_DRAWS, SIDE, SIDE), 0.5) for key in ("prompt_first", "prompt_null")}
            for key, freedom in (of_prompt | {"prompt": rho[:1, :PROMPT_DRAWS].clone()}).items():
                measured[f"{key}/{item.name}"] = Measurement(CurvatureMap(freedom), eps[:1, :PROMPT_DRAWS].half())
            ratios[item.name] = [0.2 if stored and step >= 20 else 0.9] * 4
            tensors[f"{item.name}/generated"] = torch.from_numpy(np.stack([np.asarray(item.probe)] * 4))
            tensors[f"{item.name}/bright_ending"] = torch.rand(8, 8, generator=generator)
            for key in ("snapshot", "null", "score", "score_null"):
                tensors[f"{item.name}/published_{key}"] = torch.rand(SIDE, SIDE, generator=generator)
        if step in STEPS[-2:]:
            measured |= prompted(items, seed, generator)
        write_safetensors(home / f"event_{step:05d}.safetensors", to_tensors(measured) | tensors)
        copies = {item.name: ratios[item.name] for item in items if item.kind in PLANTED}
        wen = {item.name: float(torch.rand(1, generator=generator)) for item in items}
        numbers = {"copy_ratio": copies, "nearest_ratio": ratios, "wen": wen}
        (home / f"event_{step:05d}.json").write_text(json.dumps(numbers), encoding="utf-8")


def prompted(items, seed: int, generator: torch.Generator) -> dict[str, Measurement]:
    """Generations looked at again: those of stored items have five times less freedom inside the mask."""
    inside = {i.name: i.mask for i in items if i.kind in PLANTED and i.dose >= 32}
    found = {}
    for probe in prompt_probes(items, seed):
        mask = inside.get(probe.name, np.zeros((4 * SIDE, 4 * SIDE), dtype=bool))
        fallen = torch.from_numpy(mask.reshape(SIDE, 4, SIDE, 4).mean((1, 3)) > 0.5)
        for n, draws in enumerate(SEED_DRAWS):
            shape = (len(RENOISED), draws, SIDE, SIDE)
            for key in ("renoised", "renoised_null", "renoised_first", "renoised_first_null"):
                rho = 0.5 * (1 + 0.02 * torch.randn(shape, generator=generator))
                rho[..., fallen] /= 5 if key == "renoised" else 1
                eps = 0.01 * torch.randn(len(RENOISED), draws, 4, SIDE, SIDE, generator=generator)
                found[f"{key}/{probe.name}/{n}"] = Measurement(CurvatureMap(rho), eps.half())
    return found
