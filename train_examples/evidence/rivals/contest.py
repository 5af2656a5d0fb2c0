"""The contest: memwatch and its rivals on the same items of the same runs, in three tables.

``oracle`` and ``best of``: the choice has seen the answer, which nobody has. memwatch's own map gets its oracle too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evidence.metrics import auc, best_of_thresholds, iou, resized, threshold_at, tpr_at_fpr
from evidence.rivals.cases import NEGATIVES, STORED, Case, cases_of, worlds_of
from evidence.rivals.rivals import ALL_ONES, F_MEM, HELD_OUT_LOSS, IMAGE_LOSS, RIVALS, Rival, scores_in
from evidence.runs.finished import Finished
from evidence.verdicts.product import Product
from evidence.verdicts.stored import first_copy
from evidence.worlds.sources import SIZE

Table = list[dict[str, Any]]
MEMWATCH, ALL = "memwatch", "all"
EMPTY = np.zeros((SIZE, SIZE))


# --- where -----------------------------------------------------------------------------------------------------------


def localization_table(products: Sequence[Product]) -> Table:
    """Mean IoU of stored parts, world by world; ``None`` where a way lacks the map of an item.

    The first row counts the items, which are the same for every way. An item that memwatch never lit counts as 0.
    Without a stored part there are no rows.
    """
    cases = [case for case in cases_of(products) if case.is_part]
    if not cases:
        return []

    def row(way: str, sampling: str, threshold: str, value_of: Callable[[list[int]], float | None]) -> dict[str, Any]:
        here = {world: [i for i, case in enumerate(cases) if case.world == world] for world in worlds_of(cases)}
        found = {world: value_of(places) for world, places in here.items()}
        known = [(value, len(here[world])) for world, value in found.items() if value is not None]
        whole = len(known) == len(found)  # ways are compared on the same items
        mean = float(np.average([v for v, _ in known], weights=[n for _, n in known])) if whole else None
        return {"way": way, "sampling": sampling, "threshold": threshold} | found | {ALL: mean}

    def oracle_row(way: str, sampling: str, maps: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
        masks = [case.item.mask for case in cases]
        return row(
            way, sampling, "oracle", lambda places: oracle([maps[i] for i in places], [masks[i] for i in places])
        )

    shipped = [iou(lit(case), case.item.mask) for case in cases]
    counts = {world: sum(case.world == world for case in cases) for world in worlds_of(cases)} | {ALL: len(cases)}
    rows = [
        {"way": "items", "sampling": None, "threshold": None} | counts,
        row(MEMWATCH, "-", "as shipped", lambda places: float(np.mean([shipped[i] for i in places]))),
        oracle_row(MEMWATCH, "-", [[resized(decisive_map(case), (SIZE, SIZE))] for case in cases]),
    ]
    for rival, maps in zip(RIVALS, maps_of(RIVALS, cases), strict=True):
        if any(maps):
            rows.append(oracle_row(rival.name, rival.sampling, maps))
    return rows


def lit(case: Case) -> np.ndarray:
    """What memwatch last lit up, bool ``(SIZE, SIZE)``; nothing where it never did."""
    region = case.product.region(case.item)
    return EMPTY > 0 if region is None else region


def decisive_map(case: Case) -> np.ndarray:
    """The map by which memwatch decided at the last event, ``(h, w)``; zeros where nothing was compared."""
    signals = case.product.findings[case.item.name][case.product.run.last].signals
    if signals is None or signals.decisive is None:
        return EMPTY
    values: np.ndarray = signals.decisive.mean.double().numpy()
    return values


def maps_of(rivals: Sequence[Rival], cases: Sequence[Case]) -> list[list[list[np.ndarray]]]:
    """Of each rival and case, every variant ``(SIZE, SIZE)`` of its map, or none. A run's tensors are read once."""
    found: list[list[list[np.ndarray]]] = [[] for _ in rivals]
    for case in cases:
        run = case.product.run
        for rival, maps in zip(rivals, found, strict=True):
            variants = rival.maps(run, case.item.name, run.last).values()
            maps.append([resized(values, (SIZE, SIZE)) for values in variants])
    return found


def oracle(maps: Sequence[Sequence[np.ndarray]], masks: Sequence[np.ndarray]) -> float | None:
    """Mean IoU over items at the best of the published thresholds, of the best variant; ``None`` without all maps."""
    if not all(maps):
        return None
    truth = np.stack(masks)
    return max(best_of_thresholds(np.stack(variant), truth).miou for variant in zip(*maps, strict=True))


# --- whether ---------------------------------------------------------------------------------------------------------


def detection_table(products: Sequence[Product], prompts: bool) -> Table:
    """Stored items against everything that is never copied, by group, at the last event.

    The first row counts the items of every group. Every rival has a row of its published score, and one of the best of
    all kinds by its AUC in hindsight.

    Args:
        prompts: whether all rivals are compared, on the worlds where all were measured; otherwise those that need no
            captions, on all worlds.

    Returns:
        No rows where nothing is stored, or everything.
    """
    cases = cases_of([p for p in products if p.run.world.prompts or not prompts])
    groups = np.array([case.group for case in cases])
    if not (groups == STORED).any() or (groups == STORED).all():
        return []
    counts = {name: int((groups == name).sum()) for name in NEGATIVES} | {ALL: int((groups != STORED).sum())}
    ours = np.array([case.product.score(case.item) for case in cases])
    rows = [
        {"way": "items", "sampling": None, "score": None, "items": int((groups == STORED).sum())}
        | {f"AUC {name}": number for name, number in counts.items()}
        | {"TPR at 1 % FPR": None},
        detection_row(MEMWATCH, "-", "deviations from the controls", ours, groups),
    ]
    rivals = [r for r in RIVALS if r is not ALL_ONES and (prompts or not r.needs_prompts)]
    for rival, kinds in zip(rivals, scores_of(rivals, cases), strict=True):
        rows += rival_rows(rival, kinds, groups)
    return rows


def scores_of(rivals: Sequence[Rival], cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
    """For each rival, by kind, the scores of all cases ``(n,)`` at their last events; NaN where there is none."""
    runs = list(dict.fromkeys(case.product.run for case in cases))
    by_run = {run: [scores_in(run, rival, run.last) for rival in rivals] for run in runs}

    def of_cases(rival: int, kind: str) -> np.ndarray:
        values = [by_run[case.product.run][rival].get(kind, {}).get(case.item.name, np.nan) for case in cases]
        return np.array(values)

    found = [list(dict.fromkeys(kind for run in runs for kind in by_run[run][i])) for i in range(len(rivals))]
    return [{kind: of_cases(i, kind) for kind in kinds} for i, kinds in enumerate(found)]


def rival_rows(rival: Rival, kinds: Mapping[str, np.ndarray], groups: np.ndarray) -> Table:
    """The published kind of score, which comes first, and the best of those that are known wherever that one is."""
    if not kinds:
        return []
    published, first = next(iter(kinds.items()))
    same = {kind: values for kind, values in kinds.items() if np.array_equal(np.isnan(values), np.isnan(first))}
    rows = {kind: detection_row(rival.name, rival.sampling, kind, values, groups) for kind, values in same.items()}
    if len(rows) == 1:
        return [rows[published]]
    best = max(rows, key=lambda kind: rows[kind][f"AUC {ALL}"] or 0.0)
    return [rows[published], rows[best] | {"score": f"{best} (best of {len(rows)})"}]


def detection_row(way: str, sampling: str, score: str, values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """One line; ``items`` are the stored ones that the way has a number of."""
    known = ~np.isnan(values)
    groups, values = groups[known], values[known]
    positives = values[groups == STORED]
    against = {name: values[groups == name] for name in NEGATIVES} | {ALL: values[groups != STORED]}
    row: dict[str, Any] = {"way": way, "sampling": sampling, "score": score, "items": len(positives) or None}
    for name, negatives in against.items():
        row[f"AUC {name}"] = auc(positives, negatives) if len(positives) and len(negatives) else None
    both = len(positives) and len(against[ALL])
    return row | {"TPR at 1 % FPR": tpr_at_fpr(positives, against[ALL]) if both else None}


# --- when ------------------------------------------------------------------------------------------------------------


def first_table(products: Sequence[Product]) -> Table:
    """Who speaks before the first copy, on stored items; shares are of all of them.

    Rivals speak at the first event at which their published score exceeds what 1 % of all negatives exceed at their
    last events. ``negatives called`` are those at any event; f_mem looks at what was never shown at the last one only.
    ``exposures`` is the median over the items that were called.
    """
    cases = cases_of(products)
    stored = [case for case in cases if case.group == STORED]
    negatives = [case for case in cases if case.group != STORED]
    if not stored or not negatives:
        return []
    ways: dict[str, Callable[[Case], int | None]] = {
        f"{MEMWATCH}, memorized": lambda case: case.product.first_alert.get(case.item.name),
        f"{MEMWATCH}, suspicious": lambda case: case.product.first_suspicion.get(case.item.name),
    }
    for rival in (F_MEM, IMAGE_LOSS, HELD_OUT_LOSS):
        ways[rival.name] = first_above(rival, negatives)
    rows = [first_row("the first copy itself", stored, [copy_of(case) for case in stored], [])]
    return rows + [first_row(way, stored, [*map(of, stored)], [*map(of, negatives)]) for way, of in ways.items()]


def copy_of(case: Case) -> int | None:
    return first_copy(case.product.run, case.item)


def first_above(rival: Rival, negatives: Sequence[Case]) -> Callable[[Case], int | None]:
    """Of a case, the first event after training began at which the rival's published score exceeds its threshold."""
    score = rival.score_of[0][1]

    def at(run: Finished, case: Case, step: int) -> float:
        value = score(run, case.item.name, step)
        return -np.inf if value is None else value

    threshold = threshold_at(np.array([at(case.product.run, case, case.product.run.last) for case in negatives]))

    def of(case: Case) -> int | None:
        run = case.product.run
        return next((step for step in run.steps[1:] if at(run, case, step) > threshold), None)

    return of


def first_row(
    way: str, stored: Sequence[Case], steps: Sequence[int | None], false: Sequence[int | None]
) -> dict[str, Any]:
    """One line.

    Args:
        steps: of the first call of every stored item; ``None`` where there was none.
        false: the same of every negative.
    """
    copies = [copy_of(case) for case in stored]
    pairs = [(call, copy) for call, copy in zip(steps, copies, strict=True) if copy is not None]
    shown = [case.product.run.exposures(case.item, s) for case, s in zip(stored, steps, strict=True) if s is not None]
    return {
        "way": way,
        "items": len(stored),
        "called": share([call is not None for call in steps]),
        "before the first copy": share([call is not None and call < copy for call, copy in pairs]),
        "at or before it": share([call is not None and call <= copy for call, copy in pairs]),
        "exposures": float(np.median(shown)) if shown else None,
        "negatives called": share([call is not None for call in false]),
    }


def share(found: Sequence[bool]) -> float | None:
    return float(np.mean(found)) if found else None
