"""The mix: no kind is left out, groups first, nothing twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support.picked import duplicates, part, surveyed

from memwatch.picking.mix import Why, in_order, pick_rows, rotation_of, slots


def picked(survey, budget, *, seed=0, room=None):
    found = pick_rows(survey, budget, np.random.default_rng(seed), room)
    assert len({p.row for p in found}) == len(found) <= budget
    return found


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 6, 16, 37, 200])
def test_the_slots_add_up_and_every_kind_has_one_from_six_on(budget):
    groups, others = slots(budget)
    assert groups + sum(others.values()) == budget
    assert groups >= 0.5 * sum(others.values())
    if budget >= 6:
        assert groups >= 2
        assert min(others.values()) >= 1


def test_every_kind_is_picked_within_a_budget_of_six():
    survey = surveyed(60, duplicates(*range(10)), duplicates(10, 11), part(20, 21, 22), rare_captions=(33, 34))
    found = {p.why: p.row for p in picked(survey, 6)}
    assert set(found) == set(Why)
    assert found[Why.DUPLICATES] == 0  # of the larger group
    assert found[Why.PART] in (20, 21, 22)
    assert found[Why.STRANGE] == 59
    assert found[Why.RARE_CAPTION] == 33
    assert 35 <= found[Why.TYPICAL] <= 45  # the median of the rows in no group is about 40


def test_a_budget_of_one_goes_to_the_largest_group():
    for groups, expected in (([duplicates(1, 2), part(3, 4, 5)], 3), ([duplicates(1, 2, 9), part(3, 4)], 1), ([], 29)):
        assert [p.row for p in picked(surveyed(30, *groups), 1)] == [expected]


def test_what_one_kind_does_not_use_goes_to_the_others():
    counts = Counter(p.why for p in picked(surveyed(100, rare_captions=tuple(range(100))), 16))
    assert counts == dict.fromkeys((Why.STRANGE, Why.RARE_CAPTION, Why.TYPICAL, Why.RANDOM), 4)
    groups = [duplicates(2 * i, 2 * i + 1) for i in range(20)]  # no row outside of the groups
    assert Counter(p.why for p in picked(surveyed(40, *groups), 16)) == {Why.DUPLICATES: 16}


def test_a_set_smaller_than_the_budget_is_picked_whole_but_for_near_duplicates_and_unreadable_rows():
    survey = surveyed(9, duplicates(0, 1, 2, 3), part(3, 4, 5), unreadable={8: "broken"})
    rows = {p.row for p in picked(survey, 9)}
    assert len(rows & {0, 1, 2, 3}) == 1
    assert rows - {0, 1, 2, 3} == {4, 5, 6, 7}


def test_a_part_that_a_picked_row_shows_already_has_no_second_slot():
    """Two pieces of one banner: the second group is the first again, less a few rows."""
    survey = surveyed(40, part(*range(10)), part(*range(8)), part(20, 21))
    found = [p for p in picked(survey, 6) if p.why is Why.PART]
    assert [p.row for p in found] == [0, 20]
    of_one_row = surveyed(40, part(*range(10)), part(0, 30))  # two logos in one picture
    assert [p.row for p in picked(of_one_row, 6) if p.why is Why.PART] == [0]


def test_fragments_come_last():
    whole, piece, other, few = part(*range(30)), part(*range(25)), part(*range(40, 60)), part(29, *range(70, 80))
    survey = surveyed(90, whole, piece, other, few, duplicates(80, 81))
    assert [len(group.rows) for group in in_order(survey.groups)] == [30, 2, 20, 11, 25]


def test_only_so_many_rows_outside_of_groups_may_be_picked():
    survey = surveyed(20, duplicates(0, 1), part(2, 3))
    found = picked(survey, 16, room=3)
    assert sum(p.row >= 4 for p in found) == 3
    assert {p.why for p in found} >= {Why.DUPLICATES, Why.PART}
    assert not [p for p in picked(surveyed(20), 16, room=0)]


def test_groups_without_a_slot_come_first_in_the_rotation_and_near_duplicates_never():
    survey = surveyed(12, duplicates(0, 1, 2), part(3, 4, 10), duplicates(5, 6), unreadable={11: "broken"})
    rotation = rotation_of(survey, watched=[0], without=[9], rng=np.random.default_rng(0))
    assert rotation[:2] == [3, 5]
    assert not {1, 2, 6} & set(rotation)  # of the watched row, and of one before
    assert sorted(rotation) == [3, 4, 5, 7, 8, 10]
