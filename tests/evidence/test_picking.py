"""What counts as found, and the page of it."""

from __future__ import annotations

import numpy as np
import pytest
from evidence import picking
from evidence.picking import Planted, files_of, grouped, is_found, picked, write_picking
from evidence.worlds.items import PLANTED, Kind, planted_set

from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import Group, GroupKind, survey


def group(*rows: int) -> Group:
    return Group(GroupKind.PART, rows, ((0.0, 0.0, 0.5, 0.5),) * len(rows))


def test_a_group_is_found_by_purity_and_cover():
    owner = np.repeat([0, 1], 10)
    for rows in (range(10), range(5), [*range(8), 10, 11]):
        assert is_found(0, owner, [group(*rows)])
    few, impure = group(*range(4)), group(*range(7), 10, 11, 12)  # less than half, and less than 80 % are the item's
    assert not is_found(0, owner, [few, impure])


@pytest.fixture(scope="module")
def few():
    """A set of few items, of all kinds; the doses of eight."""
    wanted = [i for i in planted_set(100) if i.dose == 8 and i.kind in PLANTED]
    wanted += [i for i in planted_set(100) if i.kind is Kind.ORDINARY][:40]
    return wanted, files_of(wanted, 100)


def test_planted_groups_are_found_and_picked_and_the_rest_left_alone(few, monkeypatch):
    monkeypatch.setattr(picking, "BUDGET", 0.25)  # of so small a set 5 % would be fewer than there are kinds of picks
    items, planted = few
    found = survey(planted.rows)
    numbers = [number for number, item in enumerate(items) if item.kind in PLANTED]
    assert all(is_found(number, planted.owner, found.groups) for number in numbers)
    assert grouped(np.flatnonzero(planted.owner >= len(numbers)), found.groups) == 0
    assert picked(planted, found, 0) >= set(numbers)


def test_the_page(monkeypatch, tmp_path, few):
    small = Planted(("mark",), np.array([0] * 4 + [-1] * 2), as_training_set(few[1].rows.source[:6]))
    monkeypatch.setattr(picking, "planted_set", lambda seed: few[0])
    monkeypatch.setattr(picking, "moved_marks", lambda seed: small)
    monkeypatch.setattr(picking, "TIMED", 2)
    text = write_picking(tmp_path, seeds=(0,), moved_seeds=(0,)).read_text(encoding="utf-8")
    assert "Written by `bench.py --pick`." in text
    assert "| logo | 8 | 2/2 | " in text
    assert "Logos found: 100.0%." in text
    assert "| mark | " in text
    assert max(map(len, text.splitlines())) < 200
