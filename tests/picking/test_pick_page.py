"""The page of a choice that was made by hand: boxes, groups without a place, members."""

from __future__ import annotations

import re

import pytest
from support.picked import chosen, duplicates, part, surveyed

from memwatch.picking.mix import Why
from memwatch.picking.page import card, in_per_cent, mix_rows, render


def test_the_box_of_a_part_is_drawn_on_every_member():
    picked = chosen(surveyed(30, part(*range(12), box=(0.25, 0.5, 0.5, 0.75)), duplicates(20, 21)), probes=6)
    cards = {c.watched.why: c for c in (card(picked, watched) for watched in picked.watched)}
    of_part = cards[Why.PART]
    assert of_part.picture.box == (25.0, 50.0, 25.0, 25.0)
    assert {shown.box for shown in of_part.fellows} == {(25.0, 50.0, 25.0, 25.0)}
    assert (len(of_part.fellows), of_part.more) == (6, 5)
    assert of_part.picture.name not in {shown.name for shown in of_part.fellows}
    assert cards[Why.DUPLICATES].picture.box is None
    assert cards[Why.STRANGE].fellows == ()
    assert "left: 25.00%; top: 50.00%" in render(picked)


def test_per_cent_of_fractions():
    assert in_per_cent((0.1, 0.2, 0.4, 0.9)) == pytest.approx((10, 20, 30, 70))


def test_groups_without_a_place_are_listed():
    picked = chosen(surveyed(40, *(duplicates(2 * i, 2 * i + 1) for i in range(12))), probes=6)
    text = re.sub(r"\s+", " ", render(picked))
    assert len(picked.unwatched_groups) == 12 - sum(p.why is Why.DUPLICATES for p in picked.watched) > 0
    assert text.count("<td>duplicates</td><td>2</td>") == len(picked.unwatched_groups)
    assert "row-00022, row-00023" in text


def test_long_tables_are_cut_and_say_so():
    survey = surveyed(200, unreadable={row: "broken" for row in range(100, 200)})
    text = render(chosen(survey, probes=16))
    assert text.count("<td>broken</td>") == 50
    assert "The first 50 of 100." in text


def test_the_mix_counts_what_was_picked():
    picked = chosen(surveyed(100, part(*range(12)), part(20, 21)), probes=16)
    rows = {kind: (meant, number) for kind, meant, number, _ in mix_rows(picked)}
    assert rows["duplicates"] == ("12 together", 0)
    assert rows["shared part"] == ("12 together", 2)
    assert rows["outlier"][0] == "1"
    assert sum(number for _, number in rows.values()) == 16


def test_a_choice_without_controls_says_so():
    assert "There are none; the notes above say why" in render(chosen(surveyed(6), probes=16))
