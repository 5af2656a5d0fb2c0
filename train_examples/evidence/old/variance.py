"""Variance: how far blocks of test vectors disturb a difference map less than as many independent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from evidence.old.exact import BASE, NOW, Design, Place, design_off
from evidence.old.stage import Stage, place_of
from tqdm.auto import tqdm

from memwatch.config import LevelsConfig, MemWatchConfig
from memwatch.measure.views import reference_view

TIMESTEPS = (1, 61, 141, 301, 501, 701)
UP_TO, BAR = 301, 2.0  # the bar: that many times less, at every level up to there
REPEATS = 32  # sets of test vectors


def variances(stage: Stage, config: MemWatchConfig) -> list[dict[str, Any]]:
    """By item and level, variance with independent vectors over that with the shipped blocks; none without a baseline.

    Of the map now minus the earlier model, at the shipped numbers of draws and vectors.
    """
    if stage.earlier is None:
        return []
    levels = LevelsConfig(timesteps=TIMESTEPS, draws=config.levels.draws)
    shipped = Design(config.levels.draws, config.curvature.vectors, config.curvature.tile)
    latents = 3 * len(TIMESTEPS) * levels.draws * len(stage.prepared)
    with tqdm(total=latents, desc="exact diagonals", unit="latent", disable=None) as bar:
        places = {
            p.name: place_of(stage, reference_view(p, stage.denoiser, levels, 0), bar.update) for p in stage.prepared
        }
    return [{"item": name, "ratios": ratios(place, shipped)} for name, place in places.items()]


def ratios(place: Place, design: Design) -> list[float]:
    """By level, how many times more the same number of independent vectors varies."""
    ours, independent = (squares(place, d) for d in (design, replace(design, tile=1)))
    return [float(ratio) for ratio in independent / ours]


def squares(place: Place, design: Design) -> torch.Tensor:
    """Mean squared error of the difference map, ``(levels,)``."""
    off = design_off(place, BASE, design, REPEATS) - design_off(place, NOW, design, REPEATS)
    return off.square().mean((0, 2))


def variance_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table, each item against the bar."""
    rows = []
    for row in found:
        by_level = dict(zip(TIMESTEPS, row["ratios"], strict=True))
        least = min(ratio for timestep, ratio in by_level.items() if timestep <= UP_TO)
        cells = {f"t = {timestep}": f"{ratio:.1f}" for timestep, ratio in by_level.items()}
        rows.append(
            {"item": row["item"]} | cells | {f"{BAR:g}x up to {UP_TO}": "met" if least >= BAR else "**missed**"}
        )
    return rows
