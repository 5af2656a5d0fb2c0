"""Mix: which rows of a training set are watched within a budget of B probes. No kind of what is memorized is left out:

| kind | slots | which rows |
|---|---|---|
| duplicates, shared parts | what the others leave | one row per group, the largest group of each kind first |
| outliers | B / 10, at least 1 | the least like their nearest others |
| rare captions | B / 10, at least 1 | the rarest first |
| typical images | B / 10, at least 1 | as far from their nearest others as most are |
| at random | B / 10, at least 1 | any |

Below 6 probes the kinds get one slot each in this order. A kind that has no rows leaves its slots to the groups, and
then to the other kinds, one each. Rows of the last four kinds are in no group. Of near-duplicates only one is picked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

import numpy as np

from memwatch.picking.survey import Group, GroupKind, Survey


class Why(StrEnum):
    """Why a row is watched; of the kinds of groups the same words."""

    DUPLICATES = "duplicates"
    PART = "shared part"
    STRANGE = "outlier"
    RARE_CAPTION = "rare caption"
    TYPICAL = "typical"
    RANDOM = "at random"


OTHERS = (Why.STRANGE, Why.RARE_CAPTION, Why.TYPICAL, Why.RANDOM)
SHARE = 10  # one slot in so many for each of the others


@dataclass(frozen=True)
class PickedRow:
    """A row that is watched, for which kind, and the group that it stands for, or else the largest that it is in."""

    row: int
    why: Why
    group: Group | None


def slots(budget: int) -> tuple[int, dict[Why, int]]:
    """Slots of the groups (duplicates and shared parts together), and of each other kind; see the table above.

    >>> slots(16)[0], slots(16)[1][Why.RANDOM], slots(3)[0]
    (12, 1, 2)
    """
    kinds = OTHERS[: max(0, budget - len(GroupKind))]
    others = {why: max(1, budget // SHARE) if why in kinds else 0 for why in OTHERS}
    return budget - sum(others.values()), others


def ordinary_rows(survey: Survey, fewest: int = 0) -> list[int]:
    """The readable rows that are in no group; where those are fewer than ``fewest``, rows that share a part as well.

    A logo that a whole set has must not be the reason why nothing is held out. Near-duplicates never count.
    """

    def outside(groups: Iterable[Group]) -> list[int]:
        grouped = {row for group in groups for row in group.rows}
        return [row for row in range(survey.size) if row not in grouped and row not in survey.unreadable]

    alone = outside(survey.groups)
    return alone if len(alone) >= fewest else outside(g for g in survey.groups if g.kind is GroupKind.DUPLICATES)


def pick_rows(
    survey: Survey,
    budget: int,
    rng: np.random.Generator,
    room: int | None = None,
    ordinary: Collection[int] | None = None,
) -> tuple[PickedRow, ...]:
    """The rows that are watched, groups first.

    Args:
        budget: how many, at least 0. Where there are fewer rows, all are picked, but one alone of near-duplicates.
        room: how many of the ordinary rows may be picked; ``None`` for all.
        ordinary: those that could be held out; by default the rows in no group.
    """
    ordinary, near = set(ordinary_rows(survey) if ordinary is None else ordinary), _near(survey)
    largest = {row: group for group in reversed(survey.groups) for row in group.rows}
    found, closed, closed_groups, outside = list[PickedRow](), set(survey.unreadable), set[int](), set[int]()

    def is_open(row: int) -> bool:
        has_room = row not in ordinary or room is None or len(outside) < room
        return has_room and row not in closed and near.get(row) not in closed_groups

    def of_kind(why: Why, rows: Iterable[int]) -> Iterator[PickedRow]:
        return (PickedRow(row, why, largest.get(row)) for row in rows if is_open(row))

    def take(offered: Iterator[PickedRow], number: int) -> bool:
        """Pick so many of what is offered, as far as the budget goes. Returns whether any was picked."""
        before = len(found)
        for picked in islice(offered, min(number, budget - len(found))):
            found.append(picked)
            closed.add(picked.row)
            closed_groups.add(near.get(picked.row, -1))
            outside.update({picked.row} & ordinary)
        return len(found) > before

    groups, others = slots(budget)
    waiting = _of_groups(survey, found, is_open)
    offered = {why: of_kind(why, rows) for why, rows in candidates_of(survey, rng).items()}
    take(waiting, groups)
    for why, number in others.items():
        take(offered[why], number)
    take(waiting, budget)
    while any([take(offered[why], 1) for why in OTHERS]):  # a list: every kind is asked
        pass
    take(of_kind(Why.RANDOM, rng.permutation(survey.size).tolist()), budget)
    return tuple(found)


def _of_groups(survey: Survey, found: Sequence[PickedRow], is_open: Callable[[int], bool]) -> Iterator[PickedRow]:
    """One row of each group that still has one to give, unless a picked row of another part shows this one."""
    for group in in_order(survey.groups):
        rows = set(group.rows) if group.kind is GroupKind.PART else set()
        if any(picked.why is Why.PART and picked.row in rows for picked in found):
            continue
        if (row := next(filter(is_open, dict.fromkeys([*group.best, *group.rows])), None)) is not None:
            yield PickedRow(row, Why(group.kind), group)


def in_order(groups: Sequence[Group]) -> list[Group]:
    """The largest of each kind first, then the others, the largest first; shared parts that look like fragments last.

    Of a fragment most rows share a part that comes before it as well.
    """
    firsts = [g for kind in GroupKind for g in [g for g in groups if g.kind is kind][:1]]
    ordered = sorted(firsts, key=lambda g: -len(g.rows)) + [g for g in groups if not any(g is f for f in firsts)]
    whole: list[Group] = []
    fragments: list[Group] = []
    sharing: dict[int, list[int]] = {}  # by row, which of ``whole`` are parts of it
    for group in ordered:
        parts = group.rows if group.kind is GroupKind.PART else ()
        common = Counter(i for row in parts for i in sharing.get(row, ()))
        if any(2 * n > min(len(parts), len(whole[i].rows)) for i, n in common.items()):
            fragments.append(group)
            continue
        for row in parts:
            sharing.setdefault(row, []).append(len(whole))
        whole.append(group)
    return whole + fragments


def candidates_of(survey: Survey, rng: np.random.Generator) -> dict[Why, list[int]]:
    """For each kind but the groups, the rows in no group, the best first; ties are broken at random."""
    ordinary = ordinary_rows(survey)
    shuffled = [ordinary[i] for i in rng.permutation(len(ordinary))]
    strange = {row: float(survey.strangeness[row]) for row in shuffled}
    middle = float(np.median(list(strange.values()))) if strange else 0.0
    return {
        Why.STRANGE: sorted(strange, key=lambda row: -strange[row]),
        Why.RARE_CAPTION: [row for row in survey.rare_captions if row in strange],
        Why.TYPICAL: sorted(strange, key=lambda row: abs(strange[row] - middle)),
        Why.RANDOM: [ordinary[i] for i in rng.permutation(len(ordinary))],
    }


def rotation_of(survey: Survey, watched: Sequence[int], without: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The rotation: one row of each group that is not watched, then all others in random order, but for ``without``.

    Near-duplicates of what comes before, and what shares a part with a watched row, are looked at there.
    """
    near, excluded = _near(survey), {*watched, *without, *survey.unreadable}
    seen, shown, first = {near[row] for row in watched if row in near}, set[int](), list[int]()
    for group in survey.groups:
        if set(watched).isdisjoint(group.rows):
            first += [row for row in group.rows if row not in excluded][:1]
        elif group.kind is GroupKind.PART:
            shown |= set(group.rows)
    found: list[int] = []
    for row in dict.fromkeys([*first, *rng.permutation(survey.size).tolist()]):  # each once
        if row not in excluded and row not in shown and near.get(row) not in seen:
            found.append(row)
            seen |= {near[row]} if row in near else set()
    return found


def _near(survey: Survey) -> dict[int, int]:
    """By row, which group of near-duplicates it is in; rows in none are left out."""
    groups = enumerate(survey.groups)
    return {row: i for i, group in groups if group.kind is GroupKind.DUPLICATES for row in group.rows}
