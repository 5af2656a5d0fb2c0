"""The page of a choice that was made by hand: boxes, groups without a slot, members."""

from __future__ import annotations

import re

from support.picked import chosen, duplicates, part, surveyed

from memwatch.picking.page import render


def shown(picked) -> str:
    return re.sub(r"\s+", " ", render(picked))


def test_the_box_of_a_part_is_drawn_on_every_member():
    picked = chosen(surveyed(30, part(*range(12), box=(0.25, 0.5, 0.5, 0.75)), duplicates(20, 21)), probes=6)
    text = shown(picked)
    box = "left: 25.00%; top: 50.00%; width: 25.00%; height: 25.00%"
    (of_part,) = (card for card in text.split("<article")[1:] if "in 12 images" in card)
    assert of_part.count(box) == of_part.count("<img") == 1 + 6  # the picked row and the first others
    assert "and 5 more" in of_part
    assert text.count(box) == 7


def test_the_mix_counts_what_was_picked_and_groups_without_a_slot_are_listed():
    picked = chosen(
        surveyed(100, part(*range(12)), part(20, 21, 22), *(duplicates(i, i + 1) for i in range(30, 60, 2)))
    )
    text = shown(picked)
    for row in (("duplicates", "12 together", 11), ("shared part", "12 together", 2), ("outlier", 1, 1)):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
    assert shown(picked).count("<td>duplicates</td><td>2</td>") == len(picked.unwatched_groups) == 15 - 11


def test_long_tables_are_cut_and_say_so():
    text = render(chosen(surveyed(200, unreadable={row: "broken" for row in range(100, 200)})))
    assert text.count("<td>broken</td>") == 50
    assert "The first 50 of 100." in text
    assert "There are none; the notes above say why" in render(chosen(surveyed(6)))
