"""Places: maps and regions against masks, one line of IoU by world for each way and threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from evidence.rivals.cases import Case, worlds_of
from evidence.rivals.rivals import Rival
from evidence.verdicts.product import Product
from evidence.worlds.items import Item
from evidence.worlds.sources import SIZE
from evidence.worlds.world import WORLDS

from memwatch.cli.metrics import THRESHOLDS, best_of_thresholds, resized

EMPTY = np.zeros((SIZE, SIZE))
PROMPTED, ALL = "worlds with prompts", "all"


@dataclass(frozen=True)
class Maps:
    """One way's maps of all cases.

    Attributes:
        variants: each ``(n, SIZE, SIZE)``, any unit, larger where more is stored; zeros where there is no map.
        known: bool ``(n,)``: where there is one.
    """

    variants: tuple[np.ndarray, ...]
    known: np.ndarray

    @classmethod
    def of(cls, found: Sequence[Sequence[np.ndarray]]) -> Maps:
        """Of every case all variants ``(h, w)``, or none; one case has some."""
        known = np.array([len(variants) > 0 for variants in found])
        number = max(map(len, found))
        filled = [[resized(v, (SIZE, SIZE)) for v in variants] or [EMPTY] * number for variants in found]
        return cls(tuple(np.stack(maps) for maps in zip(*filled, strict=True)), known)

    def chosen(self, which: np.ndarray) -> list[np.ndarray]:
        return [maps[which] for maps in self.variants]


def maps_of(rivals: Sequence[Rival], cases: Sequence[Case]) -> list[Maps | None]:
    """Of each rival, at the last events; ``None`` where it has no map at all. A run's tensors are read once."""
    found: list[list[list[np.ndarray]]] = [[] for _ in rivals]
    for case in cases:
        run = case.product.run
        for rival, maps in zip(rivals, found, strict=True):
            maps.append(list(rival.maps(run, case.item.name, run.last).values()))
    return [Maps.of(maps) if any(maps) else None for maps in found]


def decisive_map(product: Product, item: Item) -> np.ndarray:
    """The map by which memwatch decided at the last event, ``(h, w)``; zeros where nothing was compared."""
    signals = product.findings[item.name][product.run.last].signals
    if signals is None or signals.decisive is None:
        return EMPTY
    values: np.ndarray = signals.decisive.mean.double().numpy()
    return values


def lit(product: Product, item: Item) -> np.ndarray:
    """What memwatch last lit up, bool ``(SIZE, SIZE)``; nothing where it never did."""
    region = product.region(item)
    return EMPTY > 0 if region is None else region


def ious(predicted: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """IoU of every item, both bool ``(n, h, w)``; no mask is empty."""
    values: np.ndarray = (predicted & masks).sum((1, 2)) / (predicted | masks).sum((1, 2))
    return values


def oracle(variants: Sequence[np.ndarray], masks: np.ndarray) -> float:
    """Mean IoU over items at the best of the published thresholds, of the best variant.

    Args:
        variants: maps ``(n, h, w)``, any unit.
        masks: bool ``(n, h, w)``.
    """
    return max(best_of_thresholds(maps, masks).miou for maps in variants)


def iou_elsewhere(variants: Sequence[np.ndarray], masks: np.ndarray, here: np.ndarray) -> float | None:
    """Mean IoU ``here`` by the variant and the threshold, in the maps' own unit, that are best on all other items.

    Args:
        variants, masks: see ``oracle``.
        here: bool ``(n,)``.

    Returns:
        ``None`` where there are no others.
    """
    if here.all():
        return None
    best, found = -1.0, 0.0
    for maps in variants:
        values = np.log1p(np.clip(maps, 0, None))
        low, high = values[~here].min(), values[~here].max()
        for threshold in low + THRESHOLDS * (high - low or 1.0):  # equal everywhere: all of it, or nothing
            score = float(ious(values[~here] > threshold, masks[~here]).mean())
            if score > best:
                best, found = score, float(ious(values[here] > threshold, masks[here]).mean())
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


def row_of_maps(way: str, sampling: str, threshold: str, maps: Maps, cases: Sequence[Case]) -> dict[str, Any]:
    """One line of a way whose regions a threshold makes.

    Args:
        threshold: ``oracle``, or ``other worlds``. A world with prompts takes the other worlds with prompts, as the
            rivals that are measured nowhere else have to.
    """
    masks, prompted = _masks(cases), np.array([WORLDS[case.world].prompts for case in cases])

    def value_of(here: np.ndarray) -> float | None:
        if not maps.known[here].all():
            return None
        if threshold == "oracle":
            return oracle(maps.chosen(here), masks[here])
        used = maps.known & (prompted if prompted[here].all() else True)
        return iou_elsewhere(maps.chosen(used), masks[used], here[used])

    return {"way": way, "sampling": sampling, "threshold": threshold} | by_world(value_of, cases)


def row_of_regions(way: str, regions: np.ndarray, cases: Sequence[Case]) -> dict[str, Any]:
    """One line of a way that has regions of its own, bool ``(n, SIZE, SIZE)``."""
    values = ious(regions, _masks(cases))
    named = {"way": way, "sampling": "-", "threshold": "as shipped"}
    return named | by_world(lambda here: float(values[here].mean()), cases)


def row_of_counts(cases: Sequence[Case]) -> dict[str, Any]:
    """The line that counts the items."""
    worlds = worlds_of(cases)
    numbers = {world: sum(case.world == world for case in cases) for world in worlds}
    of_prompts = sum(numbers[world] for world in worlds if WORLDS[world].prompts)
    named = {"way": "items", "sampling": None, "threshold": None}
    return named | numbers | {PROMPTED: of_prompts, ALL: len(cases)}


def by_world(value_of: Callable[[np.ndarray], float | None], cases: Sequence[Case]) -> dict[str, float | None]:
    """What every world has, and the mean over the items of several worlds, each at its own world's threshold.

    A mean is ``None`` where one of its worlds has no number: ways are compared on the same items.
    """
    of_case, worlds = np.array([case.world for case in cases]), worlds_of(cases)
    found = {world: value_of(of_case == world) for world in worlds}

    def pooled(names: Sequence[str]) -> float | None:
        values = [found[name] for name in names]
        known = [value for value in values if value is not None]
        if not names or len(known) < len(names):
            return None
        return float(np.average(known, weights=[(of_case == name).sum() for name in names]))

    return found | {PROMPTED: pooled([name for name in worlds if WORLDS[name].prompts]), ALL: pooled(worlds)}


def _masks(cases: Sequence[Case]) -> np.ndarray:
    return np.stack([case.item.mask for case in cases])
