"""The contest: memwatch and its rivals on the same items of the same runs, in three tables.

``other worlds``: a world's threshold was chosen on the runs of the others. ``oracle`` and ``best of``: the choice has
seen the answer, which is generous; memwatch's own map gets its oracle as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from evidence.rivals.cases import (
    NEGATIVES,
    STORED,
    Case,
    above_elsewhere,
    cases_of,
    with_prompts,
)
from evidence.rivals.maps import ALL, Maps, decisive_map, lit, maps_of, row_of_counts, row_of_maps, row_of_regions
from evidence.rivals.rivals import ALL_ONES, F_MEM, HELD_OUT_LOSS, IMAGE_LOSS, RIVALS, Rival, scores_in
from evidence.runs.finished import Finished
from evidence.verdicts.product import Product
from evidence.verdicts.stored import first_copy

from memwatch.cli.metrics import auc, threshold_at, tpr_at_fpr
from memwatch.judge.alerts import Verdict

Table = list[dict[str, Any]]
MEMWATCH = "memwatch"


# --- where -----------------------------------------------------------------------------------------------------------


def localization_table(products: Sequence[Product]) -> Table:
    """IoU of stored parts, mean over items, world by world; ``None`` where a way lacks the map of an item.

    The first row counts the items, which are the same for every way. An item that memwatch never lit counts as 0.
    Without a stored part there are no rows.
    """
    cases = [case for case in cases_of(products) if case.is_part]
    if not cases:
        return []
    ours = Maps.of([[decisive_map(case.product, case.item)] for case in cases])
    rows = [
        row_of_counts(cases),
        row_of_regions(MEMWATCH, np.stack([lit(case.product, case.item) for case in cases]), cases),
        *(row_of_maps(MEMWATCH, "-", threshold, ours, cases) for threshold in ("other worlds", "oracle")),
    ]
    for rival, maps in zip(RIVALS, maps_of(RIVALS, cases), strict=True):
        if maps is not None:
            rows += [
                row_of_maps(rival.name, rival.sampling, threshold, maps, cases)
                for threshold in ("other worlds", "oracle")
            ]
    return rows


# --- whether ---------------------------------------------------------------------------------------------------------


def detection_table(products: Sequence[Product], prompts: bool) -> Table:
    """Stored items against everything that is never copied, by group, at the last event.

    ``called`` and ``false`` are shares of the stored and of all others at a threshold that calls 1 % of the others in
    the other worlds; of memwatch as shipped, what it called memorized at any event. The first row counts the items of
    every group. Every rival has a row of its published score, and one of the best of all kinds by its AUC in hindsight.

    Args:
        prompts: whether all rivals are compared, on the worlds where all were measured; otherwise those that need no
            captions, on all worlds.

    Returns:
        No rows where nothing is stored, or everything.
    """
    cases = cases_of(with_prompts(products) if prompts else products)
    groups = np.array([case.group for case in cases])
    if not (groups == STORED).any() or (groups == STORED).all():
        return []
    ours = np.array([case.product.score(case.item) for case in cases])
    called = np.array([case.product.called(case.item) for case in cases])
    rows = [
        counted(groups),
        shipped_row(called, groups),
        detection_row(MEMWATCH, "-", "z_score over the controls", ours, cases),
    ]
    rivals = [r for r in RIVALS if r is not ALL_ONES and (prompts or not r.needs_prompts)]
    for rival, kinds in zip(rivals, scores_of(rivals, cases), strict=True):
        rows += rival_rows(rival, kinds, cases)
    return rows


def scores_of(rivals: Sequence[Rival], cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
    """For each rival, by kind, the scores of all cases ``(n,)`` at their last events; NaN where there is none."""
    runs = list(dict.fromkeys(case.product.run for case in cases))
    by_run = {run: [scores_in(run, rival, run.last) for rival in rivals] for run in runs}
    found = []
    for i in range(len(rivals)):
        kinds = list(dict.fromkeys(kind for run in runs for kind in by_run[run][i]))
        found.append({kind: _aligned({run: by_run[run][i].get(kind, {}) for run in runs}, cases) for kind in kinds})
    return found


def _aligned(values: Mapping[Finished, Mapping[str, float]], cases: Sequence[Case]) -> np.ndarray:
    return np.array([values[case.product.run].get(case.item.name, np.nan) for case in cases])


def rival_rows(rival: Rival, kinds: Mapping[str, np.ndarray], cases: Sequence[Case]) -> Table:
    """The published kind of score, which comes first, and the best of those that are known wherever that one is."""
    if not kinds:
        return []
    published, first = next(iter(kinds.items()))
    same = {kind: values for kind, values in kinds.items() if np.array_equal(np.isnan(values), np.isnan(first))}
    rows = {kind: detection_row(rival.name, rival.sampling, kind, values, cases) for kind, values in same.items()}
    if len(rows) == 1:
        return [rows[published]]
    best = max(rows, key=lambda kind: rows[kind][f"AUC {ALL}"] or 0.0)
    return [rows[published], rows[best] | {"score": f"{best} (best of {len(rows)})"}]


def detection_row(way: str, sampling: str, score: str, values: np.ndarray, cases: Sequence[Case]) -> dict[str, Any]:
    """One line; ``items`` are the stored ones that the way has a number of."""
    known = ~np.isnan(values)
    groups = np.array([case.group for case in cases])[known]
    worlds, values = np.array([case.world for case in cases])[known], values[known]
    positives = values[groups == STORED]
    against = {name: values[groups == name] for name in NEGATIVES} | {ALL: values[groups != STORED]}
    row: dict[str, Any] = {"way": way, "sampling": sampling, "score": score, "items": len(positives) or None}
    for says, metric in (("AUC", auc), ("TPR", tpr_at_fpr)):
        for name, negatives in against.items():
            row[f"{says} {name}"] = metric(positives, negatives) if len(positives) and len(negatives) else None
    above = above_elsewhere(values, groups != STORED, worlds)
    return row | (shares(above, groups) if above is not None else {"called": None, "false": None})


def shares(above: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """Of the stored, and of all others; ``None`` of nobody."""
    parts = {"called": above[groups == STORED], "false": above[groups != STORED]}
    return {key: float(part.mean()) if len(part) else None for key, part in parts.items()}


def shipped_row(called: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """memwatch's own rule, which has no other threshold: without AUC and TPR."""
    row = {key: None for key in counted(groups)} | {"way": MEMWATCH, "sampling": "-", "score": "as shipped"}
    return row | {"items": int((groups == STORED).sum())} | shares(called, groups)


def counted(groups: np.ndarray) -> dict[str, Any]:
    """The row that counts the items of every group, below their AUC."""
    stored, others = int((groups == STORED).sum()), int((groups != STORED).sum())
    numbers = {name: int((groups == name).sum()) for name in NEGATIVES} | {ALL: others}
    row: dict[str, Any] = {"way": "items", "sampling": None, "score": None, "items": stored}
    row |= {f"AUC {name}": number for name, number in numbers.items()}
    return row | {f"TPR {name}": None for name in numbers} | {"called": None, "false": None}


# --- when ------------------------------------------------------------------------------------------------------------


def first_table(products: Sequence[Product]) -> Table:
    """Who speaks before the first copy, on stored items; shares are of all of them.

    memwatch says ``memorized`` at the second event with evidence at the earliest. Rivals speak at the first event at
    which their published score exceeds what 1 % of the negatives of the *other* worlds exceed at their last events.
    ``negatives called`` are those at any event; f_mem looks at what was never shown at the last one only. ``exposures``
    is the median over the items that were called.
    """
    cases = cases_of(products)
    stored = [case for case in cases if case.group == STORED]
    negatives = [case for case in cases if case.group != STORED]
    if not stored:
        return []
    rows = [first_row("the first copy itself", stored, [first_copy(case.product.run, case.item) for case in stored])]
    for says, steps_of in ((Verdict.MEMORIZED, _first_alert), (Verdict.SUSPICIOUS, _first_suspicion)):
        steps = [steps_of(case.product).get(case.item.name) for case in stored]
        false = [case.item.name in steps_of(case.product) for case in negatives]
        rows.append(first_row(f"{MEMWATCH}, {says}", stored, steps, false))
    return rows + [rival_first_row(rival, stored, negatives) for rival in (F_MEM, IMAGE_LOSS, HELD_OUT_LOSS)]


_first_alert: Callable[[Product], Mapping[str, int]] = attrgetter("first_alert")
_first_suspicion: Callable[[Product], Mapping[str, int]] = attrgetter("first_suspicion")


def rival_first_row(rival: Rival, stored: Sequence[Case], negatives: Sequence[Case]) -> dict[str, Any]:
    """One line; without other worlds to choose a threshold on, only its name."""
    at_last = [(case, score_at(rival, case, case.product.run.last)) for case in negatives]
    known = [(case, number) for case, number in at_last if number is not None]
    bars: dict[str, float] = {}
    for world in {case.world for case in (*stored, *negatives)}:
        elsewhere = np.array([number for case, number in known if case.world != world])
        if not len(elsewhere):
            return first_row(rival.name, [], [])
        bars[world] = threshold_at(elsewhere)
    steps = [first_above(rival, case, bars[case.world]) for case in stored]
    return first_row(rival.name, stored, steps, [first_above(rival, c, bars[c.world]) is not None for c in negatives])


def score_at(rival: Rival, case: Case, step: int) -> float | None:
    """The published kind of score of a rival that has no map."""
    return rival.score_of[0][1](case.product.run, case.item.name, step)


def first_above(rival: Rival, case: Case, bar: float) -> int | None:
    """The first event after training began at which the score exceeds the bar."""
    numbers = ((step, score_at(rival, case, step)) for step in case.product.run.steps[1:])
    return next((step for step, number in numbers if number is not None and number > bar), None)


def first_row(
    way: str, stored: Sequence[Case], steps: Sequence[int | None], false: Sequence[bool] = ()
) -> dict[str, Any]:
    """One line.

    Args:
        steps: of the first call of every stored item; ``None`` where there was none.
        false: whether each negative was called.
    """
    copies = [first_copy(case.product.run, case.item) for case in stored]
    pairs = [(call, copy) for call, copy in zip(steps, copies, strict=True) if copy is not None]
    shown = [case.product.run.exposures(case.item, s) for case, s in zip(stored, steps, strict=True) if s is not None]
    return {
        "way": way,
        "items": len(stored) or None,
        "called": share([call is not None for call in steps]),
        "before the first copy": share([call is not None and call < copy for call, copy in pairs]),
        "at or before it": share([call is not None and call <= copy for call, copy in pairs]),
        "exposures": float(np.median(shown)) if shown else None,
        "negatives called": share(false),
    }


def share(found: Sequence[bool]) -> float | None:
    return float(np.mean(found)) if len(found) else None
