"""Cost: memwatch beside the published procedure on tiny-sd, at equal or lower error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from evidence.old.exact import Design, bootstrap, design_error, published_error, smallest
from evidence.old.meter import seconds_of
from evidence.old.procedure import (
    VECTORS,
    Rows,
    all_maps,
    counted_leniently,
    prompt_rows,
    published_rows,
    reference_rows,
    shared_rows,
)
from evidence.old.stage import Stage, place_of, published_work, run_ours
from tqdm.auto import tqdm

from memwatch.config import LevelsConfig, MemWatchConfig
from memwatch.measure.views import reference_view

MODELS = ("tiny-sd", "sd15-32", "sd15-64")
ONE, ALL, SHIPPED = "one noisy latent", "all levels", "as shipped, full"
BARS = {"reference": (15.0, 10.0), "prompt": (6.0, 6.0)}  # times fewer passes, times less time: at least
SEEDS = 1  # generations of the published procedure, and of a prompt probe beside it


# --- errors against the exact diagonal -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What the published estimator and memwatch's designs are off by, ``(items, maps)`` mean squares.

    Attributes:
        levels: noise levels in a map.
    """

    published: np.ndarray
    designs: Mapping[Design, np.ndarray]
    levels: int

    def best(self, items: np.ndarray | None = None) -> Design | None:
        """The cheapest design that is as good on these items; ``None`` where none is."""
        chosen = np.arange(len(self.published)) if items is None else items
        errors = {design: error[chosen] for design, error in self.designs.items()}
        costs = {design: design.passes(self.levels) for design in errors}
        found: Design | None = smallest(errors, self.published[chosen], costs)
        return found


def designs(draws: int) -> list[Design]:
    """Up to so many draws, powers of two, with blocks of up to 64 vectors."""
    powers = [2**k for k in range(7)]
    return [Design(d, k) for d in powers if d <= draws for k in powers if d * k <= 64 and k <= VECTORS]


def shipped(config: MemWatchConfig) -> Design:
    """What the configuration does."""
    return Design(config.levels.draws, config.curvature.vectors, config.curvature.tile)


def search(stage: Stage, config: MemWatchConfig) -> dict[tuple[str, str], Search]:
    """By kind of probe (``reference``, ``prompt``) and of map (``ONE``, ``ALL``)."""
    levels = config.levels
    once = replace(levels, draws=1, screen_draws=1)
    latents = len(levels.timesteps) * (levels.draws + once.draws) * (2 + (stage.earlier is not None))
    with tqdm(total=len(stage.prepared) * latents, desc="exact diagonals", unit="latent", disable=None) as bar:
        found: dict[tuple[str, str], list[tuple[np.ndarray, dict[Design, np.ndarray]]]] = {}
        for p in stage.prepared:
            for kind in BARS:
                is_reference = kind == "reference"
                view = (
                    reference_view(p, stage.denoiser, levels, 0)
                    if is_reference
                    else stage.generated(p, config.sampling, once, 1)
                )
                place = place_of(stage, view, bar.update)
                target = published_error(place, VECTORS)
                for name, most in ((ONE, 1), (ALL, place.draws)):
                    tried = designs(most) + [d for d in (shipped(config),) if name == ALL and d.draws <= most]
                    errors = {d: design_error(place, d, pooled=name == ALL) for d in tried}
                    found.setdefault((kind, name), []).append((target, errors))
    return {
        key: Search(
            np.stack([target for target, _ in items]),
            {d: np.stack([errors[d] for _, errors in items]) for d in items[0][1]},
            len(levels.timesteps) if key[1] == ALL else 1,
        )
        for key, items in found.items()
    }


# --- side by side ----------------------------------------------------------------------------------------------------


def rows_of(kind: str, latents: int, vectors: int, seeds: int, steps: int) -> Rows:
    return reference_rows(latents, vectors) if kind == "reference" else prompt_rows(latents, vectors, seeds, steps)


def plans(
    searches: Mapping[tuple[str, str], Search], config: MemWatchConfig
) -> Iterator[tuple[str, str, Design | None, int, int]]:
    """Kind of probe, kind of map, design, levels and generations of everything that is put side by side."""
    for (kind, name), found in searches.items():
        yield kind, name, found.best(), found.levels, SEEDS
    for kind in BARS:
        yield kind, SHIPPED, shipped(config), len(config.levels.timesteps), config.seeds


def side_by_side(stage: Stage, searches: Mapping[tuple[str, str], Search], config: MemWatchConfig) -> dict[str, Any]:
    """The published procedure and memwatch on tiny-sd: passes, seconds and errors, with intervals over items."""
    device, steps = stage.denoiser.device, config.sampling.num_inference_steps
    bar = tqdm(stage.prepared, desc="published procedure", unit="item", disable=None)
    published = np.array([seconds_of(published_work(stage, p), device) for p in bar])
    rows: list[dict[str, Any]] = []
    for kind, name, design, levels, seeds in plans(searches, config):
        if design is None:
            rows.append({"probe": kind, "map": name, "draws": None, "vectors": None})
            continue
        taken = config.levels.timesteps[:: max(1, len(config.levels.timesteps) // levels)][:levels]
        how = stage, design, LevelsConfig(timesteps=taken, draws=design.draws), kind, config, seeds
        ours = np.array([seconds_of(partial(run_ours, p, *how), device) for p in stage.prepared])
        passes = rows_of(kind, levels * design.draws, design.vectors, seeds, steps).passes
        found = searches.get((kind, name))
        known = searches[kind, ALL] if name == SHIPPED and design in searches[kind, ALL].designs else found
        rows.append(
            {"probe": kind, "map": name, "draws": design.draws, "vectors": design.vectors, "passes": passes}
            | ratios(found, design, passes, published, ours, partial(n_passes, kind, levels, steps))
            | (errors_of(known, design) if known else {})
        )
    return {"says": stage.says, "items": len(stage.prepared), "published": published_numbers(published), "rows": rows}


def n_passes(kind: str, levels: int, steps: int, design: Design) -> int:
    """Of one look at a probe."""
    return rows_of(kind, levels * design.draws, design.vectors, SEEDS, steps).passes


def published_numbers(seconds: np.ndarray) -> dict[str, Any]:
    """The rival's own cost."""
    mean = bootstrap(len(seconds), lambda items: float(seconds[items].mean()))
    counts = {"rows": all_maps(published_rows()).passes, "lenient": counted_leniently(), "shared": shared_rows().passes}
    return counts | {"seconds": float(seconds.mean()), "seconds_interval": mean}


def ratios(
    found: Search | None,
    design: Design,
    passes: int,
    published: np.ndarray,
    ours: np.ndarray,
    passes_of: Callable[[Design], int],
) -> dict[str, Any]:
    """How many times fewer passes, by the lenient count and by the one trajectory, and how many times less time."""

    def fewer(items: np.ndarray) -> float | None:
        best = design if found is None else found.best(items)
        return None if best is None else counted_leniently() / passes_of(best)

    n = len(ours)
    return {
        "seconds": float(ours.mean()),
        "seconds_interval": bootstrap(n, lambda items: float(ours[items].mean())),
        "fewer": counted_leniently() / passes,
        "fewer_interval": None if found is None else bootstrap(n, fewer),
        "fewer_than_rows": all_maps(published_rows()).passes / passes,
        "fewer_than_shared": shared_rows().passes / passes,
        "faster": float(published.mean() / ours.mean()),
        "faster_interval": bootstrap(n, lambda items: float(published[items].mean() / ours[items].mean())),
    }


def errors_of(found: Search, design: Design) -> dict[str, Any]:
    """Root mean squares of the published maps and of the design's, snapshot first where there is one."""

    def rms(errors: np.ndarray) -> list[float]:
        return [float(value) for value in np.sqrt(errors.mean(0))]

    def intervals(errors: np.ndarray) -> list[tuple[float, float] | None]:
        return [bootstrap(len(errors), partial(_rms_of, of_map)) for of_map in errors.T]

    theirs, ours = found.published, found.designs[design]
    return {
        "error_published": rms(theirs),
        "error_published_interval": intervals(theirs),
        "error": rms(ours),
        "error_interval": intervals(ours),
    }


def _rms_of(squares: np.ndarray, items: np.ndarray) -> float:
    return float(np.sqrt(squares[items].mean()))
