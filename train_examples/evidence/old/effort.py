"""Effort: network passes that each way of looking takes for one picture at one event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from evidence.old.procedure import BRANCHES, Rows, all_maps, prompt_rows, published_rows, reference_rows
from evidence.runs.protocol import CURVATURE, GENERATION, LEVELS, NUM_SEEDS, PUBLISHED, SHIPPED
from evidence.verdicts.product import Product


def measured_share(products: Sequence[Product]) -> float:
    """Of all looks after the first event, the share at which memwatch measured curvature."""
    shares = [len(p.run.measured(s)) / len(p.run.items) for p in products for s in p.run.steps[1:]]
    return float(np.mean(shares))


def effort_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Passes per picture and event; baselines come from the ledger, where memwatch has one."""
    levels = len(LEVELS.timesteps)
    screen = Rows(forward=levels * LEVELS.screen_draws * BRANCHES)
    full, share = reference_rows(levels * LEVELS.draws, CURVATURE.vectors), measured_share(products)
    sampling = SHIPPED.sampling
    prompt = prompt_rows(levels * LEVELS.draws, CURVATURE.vectors, SHIPPED.seeds, sampling.num_inference_steps)
    maps, steps = published_rows(), {"published": PUBLISHED, "verified": GENERATION}
    made = {
        how: BRANCHES * s.num_inference_steps * (1 if how == "published" else NUM_SEEDS) for how, s in steps.items()
    }
    ways: dict[str, float] = {
        f"memwatch, reference probes, as screened in these runs ({share:.0%} measured with curvature)": (
            screen.passes + share * full.passes
        ),
        "memwatch, reference probes, everything measured": screen.passes + full.passes,
        "memwatch, prompt probes": prompt.passes,
        "published, its best map (snapshot)": maps["snapshot"].passes,
        "published, all four maps": all_maps(maps).passes,
        "bright ending, as published": made["published"] + 1,
        "wen norm, as published": made["published"],
        "wen norm and bright ending, as copies are verified": made["verified"],
        "f_mem": made["verified"],
        "clid": levels * LEVELS.draws * BRANCHES,
        "loss per image": levels * LEVELS.screen_draws,
    }
    return [{"way": way, "passes": f"{passes:.0f}"} for way, passes in ways.items()]
