"""Prompted: how much of what memwatch sees comes from having the training image, on the same stored items.

A reference probe is the training image under fixed noise. A prompt probe is its caption alone: what the caption
generates is noised again and looked at in the same way. memwatch's own judge judges both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from evidence.rivals.cases import STORED, Case, with_prompts
from evidence.rivals.maps import ALL, Maps, decisive_map, lit, row_of_maps, row_of_regions
from evidence.rivals.rivals import Rival, kept_map
from evidence.runs.event import PROMPTED
from evidence.runs.finished import Finished
from evidence.runs.protocol import NUM_SEEDS, SHIPPED
from evidence.verdicts.product import Product
from evidence.verdicts.stored import stored_items
from evidence.worlds.items import PLANTED, Item, Kind

from memwatch.cli.metrics import auc, resized, tpr_at_fpr
from memwatch.judge.findings import judge_event
from memwatch.measure.measurement import Observation

SEEDS = (1, 2, NUM_SEEDS)
PUBLISHED = Rival("Kim & Lee", "published", kept_map("published/snapshot"), needs_prompts=True)


def prompt_table(products: Sequence[Product]) -> list[dict[str, Any]]:
    """Reference against prompt probes on what is planted and stored, in the worlds with prompts.

    ``pixel AUROC``: the chance that a pixel inside the mask exceeds one outside, and ``IoU``, of the regions that are
    lit and of the map at its oracle, are of items of which a part is stored. ``AUC`` and ``TPR`` at 1 % are of scores
    against held-out captions. ``lit`` are the shares of which memwatch's own rule lights up anything. All but the
    first row and the last are judged at the last event alone, by controls of their own kind and without peers.

    Returns:
        No rows where no planted item is stored.
    """
    asked = with_prompts(products)
    if not any(stored_of(p.run) for p in asked):
        return []
    rows = [row_of("training image, as shipped", asked)]
    rows.append(row_of("training image, one event", [one_event(p.run, by_image) for p in asked]))
    for seeds in SEEDS:
        judged = [one_event(p.run, partial(by_caption, seeds=seeds)) for p in asked]
        rows.append(row_of(f"caption, {seeds} generation{'s' * (seeds > 1)}", judged))
    return [*rows, published_row(asked)]


def stored_of(run: Finished) -> list[Item]:
    """What is planted and stored."""
    return [item for item in stored_items(run) if item.kind in PLANTED]


def by_image(run: Finished, name: str) -> Observation:
    return run.observation(name, run.last, curvature=True)


def by_caption(run: Finished, name: str, seeds: int) -> Observation:
    return run.prompt_observation(name, seeds)


def one_event(run: Finished, observe: Callable[[Finished, str], Observation]) -> Product:
    """What memwatch would say of planted and held-out items if the last event were its only one."""
    names = [item.name for item in run.items if item.kind in PROMPTED]
    judgement = judge_event([observe(run, name) for name in names], {}, run.last, SHIPPED, planned=1)
    return Product(run, {run.last: judgement})


# --- rows ------------------------------------------------------------------------------------------------------------


def row_of(way: str, products: Sequence[Product]) -> dict[str, Any]:
    """One line of memwatch's own judge."""
    parts = parts_of(products)
    maps = [[decisive_map(case.product, case.item)] for case in parts]
    regions = [lit(case.product, case.item) for case in parts]
    iou = row_of_regions(way, np.stack(regions), parts)[ALL] if parts else None
    row = line(way, products, maps, iou, lambda p, item: p.score(item))
    groups = {"lit": [(p, stored_of(p.run)) for p in products]}
    groups["held out lit"] = [(p, p.run.of_kind(Kind.HELD_OUT)) for p in products]
    return row | {key: share_lit([(p, i) for p, items in group for i in items]) for key, group in groups.items()}


def share_lit(items: Sequence[tuple[Product, Item]]) -> float | None:
    return float(np.mean([p.region(item) is not None for p, item in items])) if items else None


def published_row(products: Sequence[Product]) -> dict[str, Any]:
    """One line of the published way, which has neither a rule nor regions of its own; its score is its map's mean."""

    def score(product: Product, item: Item) -> float:
        found = PUBLISHED.scores(product.run, item.name, product.run.last)
        return next(iter(found.values()))

    parts = parts_of(products)
    maps = [list(PUBLISHED.maps(c.product.run, c.item.name, c.product.run.last).values())[:1] for c in parts]
    return line("caption, the published way", products, maps, None, score)


def line(
    way: str,
    products: Sequence[Product],
    maps: Sequence[Sequence[np.ndarray]],
    iou: float | None,
    score: Callable[[Product, Item], float],
) -> dict[str, Any]:
    """One line.

    Args:
        maps: of every one of ``parts_of(products)``, one ``(h, w)``.
        iou: of regions, where the way has some.
        score: of an item.
    """
    parts = parts_of(products)
    stored = [score(p, item) for p in products for item in stored_of(p.run)]
    held_out = [score(p, item) for p in products for item in p.run.of_kind(Kind.HELD_OUT)]
    pixels = [pixel_auroc(found[0], case.item.mask) for found, case in zip(maps, parts, strict=True)]
    return {
        "way": way,
        "items": len(stored),
        "parts of pictures": len(parts),
        "pixel AUROC": float(np.mean(pixels)) if pixels else None,
        "IoU": iou,
        "IoU, oracle": row_of_maps(way, "-", "oracle", Maps.of(maps), parts)[ALL] if parts else None,
        "AUC held out": auc(stored, held_out) if held_out else None,
        "TPR held out": tpr_at_fpr(stored, held_out) if held_out else None,
        "lit": None,
        "held out lit": None,
    }


def parts_of(products: Sequence[Product]) -> list[Case]:
    """Stored planted items whose mask is a part of the picture."""
    cases = [Case(p, item, STORED) for p in products for item in stored_of(p.run)]
    return [case for case in cases if case.is_part]


def pixel_auroc(values: np.ndarray, mask: np.ndarray) -> float:
    """Probability that a pixel inside the mask exceeds one outside; ``values`` ``(h, w)`` of any size."""
    values = resized(values, (mask.shape[0], mask.shape[1]))
    return auc(values[mask], values[~mask])
