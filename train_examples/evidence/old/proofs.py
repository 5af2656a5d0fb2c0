"""Proofs: whether memwatch's own ``copied`` is right, by the benchmark's ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from evidence.runs.finished import Finished
from evidence.runs.protocol import through_vae
from evidence.verdicts.product import Product

from memwatch.judge.findings import Finding
from memwatch.judge.proof import compared
from memwatch.measure.copies import COPY, Pool

MOST = 16  # generations of a caption that are compared; what many items share has up to 96, which would take minutes


def proof_table(products: Sequence[Product], vae_of: Callable[[Finished], Any]) -> list[dict[str, Any]]:
    """Generations of what memwatch spoke of, world by world, and of all worlds together.

    memwatch generates when something newly becomes suspicious or memorized; the last event is added, where most copies
    are.

    ``precision``: of those that memwatch says copy the region, the share that copy the item inside its mask by the
    benchmark's rule. ``recall``: the other way round.

    Args:
        vae_of: a run's autoencoder, ``None`` for models on pixels; asked once per base.
    """
    counts: dict[str, np.ndarray] = {}
    vaes: dict[str, Any] = {}
    for product in products:
        world = product.run.world
        if world.base not in vaes:
            vaes[world.base] = vae_of(product.run)
        name = product.run.world_name
        counts[name] = counts.get(name, np.zeros(4, dtype=int)) + counts_of(product, vaes[world.base])
    total = sum(counts.values(), start=np.zeros(4, dtype=int))
    return [*(row(name, found) for name, found in counts.items()), row("all", total)]


def counts_of(product: Product, vae: Any) -> np.ndarray:
    """What ``counted`` gives, summed over what memwatch spoke of: where it was news, and at the last event."""
    run, total = product.run, np.zeros(4, dtype=int)
    pool = pool_of(run, vae)
    items = {item.name: item for item in run.watched}
    for step, judgement in product.events.items():
        for finding in judgement.findings:
            ratios = run.numbers[step]["copy_ratio"].get(finding.name)
            if ratios and finding.regions and (finding.is_alert or step == run.last):
                made = run.generated(items[finding.name], step)
                total += counted(finding, made[:MOST], ratios[:MOST], pool)
    return total


def pool_of(run: Finished, vae: Any) -> Pool:
    """The pictures that memwatch compares with: those of all its probes, as the autoencoder gives them back."""
    pictures = through_vae([np.asarray(item.probe) for item in run.items], vae)
    shown = (pictures[:, None] * 255).round().astype(np.uint8)
    named = {item.name: picture for item, picture in zip(run.items, shown, strict=True)}
    return Pool.of(named, {name for name, probe in run.probes.items() if probe.is_control})


def counted(finding: Finding, generations: np.ndarray, ratios: Sequence[float], pool: Pool) -> np.ndarray:
    """Of the generations: how many, and how many of them both call copies, memwatch does, and the benchmark does.

    Args:
        generations: RGB uint8 ``(n, SIZE, SIZE, 3)``.
        ratios: the benchmark's own, one per generation.
    """
    true = np.asarray(ratios) < COPY
    said = np.asarray(compared(finding, generations, pool)[0]) < COPY
    return np.array([len(true), (said & true).sum(), said.sum(), true.sum()])


def row(name: str, counts: np.ndarray) -> dict[str, Any]:
    generations, both, said, true = map(int, counts)
    return {
        "world": name,
        "generations": generations,
        "copies by the benchmark": true,
        "copies by memwatch": said,
        "precision": both / said if said else None,
        "recall": both / true if true else None,
    }
