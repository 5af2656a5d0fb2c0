"""Mix: which rows of a training set are watched within a budget.

Research disagrees about what is memorized first, so no kind is left out. Of a budget of B probes:

| kind | places | which rows |
|---|---|---|
| duplicates, shared parts | what the others leave | one row per group, the largest group of each kind first |
| outliers | B / 10, at least 1 | the least like their nearest others |
| rare captions | B / 10, at least 1 | the rarest first |
| typical images | B / 10, at least 1 | as far from their nearest others as most are |
| at random | B / 10, at least 1 | any |

Below 6 probes the kinds get one place each in this order, as far as the places go. A kind that has no rows leaves its
places to the groups, and then to the other kinds, one each. Rows of the last four kinds are in no group. Of
near-duplicates only one is picked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
SHARE = 10  # one place in so many for each of the others


@dataclass(frozen=True)
class PickedRow:
    """A row that is watched.

    Attributes:
        why: the kind that it was picked for.
        group: the one that it stands for, else the largest that it is in; ``None`` where it is in none.
    """

    row: int
    why: Why
    group: Group | None


def places(budget: int) -> tuple[int, dict[Why, int]]:
    """Places of the groups (duplicates and shared parts together), and of each other kind; see the table above.

    >>> groups, others = places(16)
    >>> groups, others[Why.STRANGE], others[Why.RANDOM]
    (12, 1, 1)
    >>> places(3)[0]
    2
    """
    kinds = OTHERS[: max(0, budget - len(GroupKind))]
    others = {why: max(1, budget // SHARE) if why in kinds else 0 for why in OTHERS}
    return budget - sum(others.values()), others


def ordinary_rows(survey: Survey) -> list[int]:
    """The readable rows that are in no group."""
    grouped = {row for group in survey.groups for row in group.rows}
    return [row for row in range(survey.size) if row not in grouped and row not in survey.unreadable]


def pick_rows(survey: Survey, budget: int, rng: np.random.Generator, room: int | None = None) -> tuple[PickedRow, ...]:
    """The rows that are watched, groups first.

    Args:
        budget: how many, at least 0. Where there are fewer rows, all are picked, but one alone of near-duplicates.
        room: how many of the rows in no group may be picked; ``None`` for all.
    """
    picks = _Picks(survey, budget, room)
    groups, others = places(budget)
    candidates = {why: iter(rows) for why, rows in candidates_of(survey, rng).items()}
    waiting = iter(in_order(survey.groups))
    picks.add_groups(waiting, groups)
    for why, number in others.items():
        for _ in range(number):
            picks.add_next(why, candidates[why])
    picks.add_groups(waiting, budget)
    while any([picks.add_next(why, candidates[why]) for why in OTHERS]):  # a list: every kind is asked
        pass
    rest = iter(rng.permutation(survey.size).tolist())
    while picks.add_next(Why.RANDOM, rest):
        pass
    return tuple(picks.found)


def in_order(groups: Sequence[Group]) -> list[Group]:
    """The largest of each kind first, then the others, the largest first; shared parts that look like fragments last.

    Of a fragment most rows share a part that comes before it as well.
    """
    firsts = [next((g for g in groups if g.kind is kind), None) for kind in GroupKind]
    first = sorted((g for g in firsts if g is not None), key=lambda g: -len(g.rows))
    whole: list[Group] = []
    fragments: list[Group] = []
    sharing: dict[int, list[int]] = {}  # by row, which of ``whole`` are parts of it
    for group in [*first, *(g for g in groups if not any(g is f for f in first))]:
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
    """For each kind but the groups, the rows in no group, the best first."""
    ordinary = ordinary_rows(survey)
    shuffled = [ordinary[i] for i in rng.permutation(len(ordinary))]  # ties are broken at random
    strange = {row: float(survey.strangeness[row]) for row in shuffled if np.isfinite(survey.strangeness[row])}
    middle = float(np.median(list(strange.values()))) if strange else 0.0
    among = set(ordinary)
    return {
        Why.STRANGE: sorted(strange, key=lambda row: -strange[row]),
        Why.RARE_CAPTION: [row for row in survey.rare_captions if row in among],
        Why.TYPICAL: sorted(strange, key=lambda row: abs(strange[row] - middle)),
        Why.RANDOM: [ordinary[i] for i in rng.permutation(len(ordinary))],
    }


def rotation_of(survey: Survey, watched: Sequence[int], without: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The rotation, in order: one row of each group that is not watched, then all others in random order.

    Near-duplicates of what comes before them are not in it, nor is what shares a part with a picked row: both are
    looked at there.

    Args:
        watched: rows that are picked. without: rows that are looked at otherwise, or not trained on.
    """
    excluded, near = {*watched, *without, *survey.unreadable}, _near(survey)
    waiting = [group for group in survey.groups if set(watched).isdisjoint(group.rows)]
    first = [next((row for row in group.rows if row not in excluded), None) for group in waiting]
    order = [*(row for row in first if row is not None), *rng.permutation(survey.size).tolist()]
    seen = {near[row] for row in watched if row in near}
    parts = (g for g in survey.groups if g.kind is GroupKind.PART and not set(watched).isdisjoint(g.rows))
    shown = {row for group in parts for row in group.rows}
    found: list[int] = []
    for row in dict.fromkeys(order):  # each once
        if row not in excluded and row not in shown and near.get(row) not in seen:
            found.append(row)
            seen |= {near[row]} if row in near else set()
    return found


def _near(survey: Survey) -> dict[int, int]:
    """By row, which group of near-duplicates it is in; rows in none are left out."""
    groups = enumerate(survey.groups)
    return {row: i for i, group in groups if group.kind is GroupKind.DUPLICATES for row in group.rows}


class _Picks:
    """Rows as they are picked: none twice, and no near-duplicates of one another."""

    def __init__(self, survey: Survey, budget: int, room: int | None) -> None:
        self.found: list[PickedRow] = []
        self._budget, self._near = budget, _near(survey)
        self._closed, self._closed_groups = set(survey.unreadable), set[int]()
        self._ordinary = set(ordinary_rows(survey))
        self._room = len(self._ordinary) if room is None else room
        self._largest: dict[int, Group] = {}
        for group in reversed(survey.groups):
            self._largest |= dict.fromkeys(group.rows, group)

    def add_groups(self, groups: Iterator[Group], number: int) -> None:
        """One row for each of the next groups that still have one to give, ``number`` groups in all."""
        while number > 0 and len(self.found) < self._budget and (group := next(groups, None)) is not None:
            if self._has_part(group):
                continue
            row = next((row for row in group.best_first if self._is_open(row)), None)
            if row is not None:
                self._add(PickedRow(row, Why(group.kind), group))
                number -= 1

    def _has_part(self, group: Group) -> bool:
        """Whether a row that was picked for another shared part shows this one as well."""
        rows = set(group.rows) if group.kind is GroupKind.PART else set()
        return any(picked.why is Why.PART and picked.row in rows for picked in self.found)

    def add_next(self, why: Why, candidates: Iterator[int]) -> bool:
        """The next candidate that may be picked. Returns whether there was one, and a place for it."""
        if len(self.found) >= self._budget:
            return False
        row = next((row for row in candidates if self._is_open(row)), None)
        if row is not None:
            self._add(PickedRow(row, why, self._largest.get(row)))
        return row is not None

    def _is_open(self, row: int) -> bool:
        is_new = row not in self._closed and self._near.get(row) not in self._closed_groups
        return is_new and (self._room > 0 or row not in self._ordinary)

    def _add(self, picked: PickedRow) -> None:
        self.found.append(picked)
        self._closed.add(picked.row)
        if picked.row in self._near:
            self._closed_groups.add(self._near[picked.row])
        self._room -= picked.row in self._ordinary
