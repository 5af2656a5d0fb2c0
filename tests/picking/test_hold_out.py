"""Controls: which rows are held out, and what is said where that is not possible."""

from __future__ import annotations

import numpy as np
import pytest
from support.picked import duplicates, part, plain_rows, surveyed

import memwatch.judge.statistic
from memwatch.picking.hold_out import BY_HAND, MIN_CONTROLS, WITHOUT, Plan, held_out, in_proportion, plan, readable_rows
from memwatch.picking.mix import ordinary_rows
from memwatch.picking.rows import RowError


def held(survey, watched, number, seed=0):
    return held_out(survey, ordinary_rows(survey), watched, number, np.random.default_rng(seed))


def test_it_takes_as_many_controls_as_the_judge_does():
    assert MIN_CONTROLS == memwatch.judge.statistic.MIN_CONTROLS == 11


@pytest.mark.parametrize(
    ("rows", "asked", "number"),
    [(1000, 20, 20), (100, 20, 20), (99, 20, 19), (1000, 11, 11), (60, 20, 12), (55, 20, 11), (54, 20, 0), (50, 11, 0)],
)
def test_one_row_in_five_and_never_fewer_than_eleven(rows, asked, number):
    assert plan(asked, readable=rows, ordinary=rows).number == number


@pytest.mark.parametrize(
    ("rows", "class_images", "number", "class_number"),
    [
        (6, 50, 1, 19),
        (6, 22, 1, 11),
        (6, 20, 1, 10),
        (5, 20, 1, 10),
        (4, 22, 0, 11),
        (4, 21, 0, 0),
        (6, 19, 0, 0),
        (60, 50, 12, 8),
        (1000, 50, 20, 0),
    ],
)
def test_half_of_the_class_images_besides(rows, class_images, number, class_number):
    found = plan(20, rows, rows, class_images, class_readable=class_images)
    assert (found.number, found.class_number) == (number, class_number)


def test_nothing_in_a_group_and_nothing_that_is_watched_is_held_out():
    survey = surveyed(60, duplicates(*range(10)), part(*range(10, 20)), unreadable={59: "broken"})
    out = held(survey, watched=[20, 21, 22], number=30)
    assert len(set(out)) == 30
    assert set(out) <= set(range(23, 59))


def test_captions_give_in_proportion():
    survey = surveyed(120, captions=(tuple(range(60)), tuple(range(60, 90))))
    out = held(survey, watched=[], number=20)
    assert [sum(a <= row < b for row in out) for a, b in ((0, 60), (60, 90), (90, 120))] == [10, 5, 5]


def test_a_caption_of_five_rows_gives_a_sibling_of_its_watched_row():
    captions = (*(tuple(range(5 * i, 5 * i + 5)) for i in range(40)), tuple(range(200, 204)))
    survey, watched = surveyed(1000, captions=captions), [3, 52, 199, 201]
    for seed in range(5):
        out = held(survey, watched, 10, seed)
        for group in (captions[0], captions[10], captions[39]):
            assert set(group) & set(out)
    few = held(survey, watched, 2)
    assert len(few) == 2
    assert all(row // 5 in (0, 10, 39) for row in few)  # as far as the number goes


def test_a_caption_of_a_template_gives_its_rest_last():
    """Rows 0 to 9 share a caption, and all but two a part: those two may show it unnoticed."""
    survey = surveyed(40, part(*range(8)), captions=(tuple(range(10)),))
    assert not {8, 9} & set(held(survey, watched=[0], number=20))
    assert {8, 9} <= set(held(survey, watched=[0], number=32))


def test_proportion_by_largest_remainders():
    assert in_proportion({0: 1, 1: 1, 2: 1}, 2) == {0: 1, 1: 1, 2: 0}
    assert in_proportion({0: 3, 1: 2}, 9) == {0: 3, 1: 2}
    assert in_proportion({}, 3) == {}


def test_too_small_a_set_says_what_is_possible():
    few = "a fifth of 6 readable rows is fewer than the 11 controls that judging takes"
    assert plan(20, 6, 6) == Plan(0, 0, (f"nothing is held out, because {few}; without controls {WITHOUT}", BY_HAND))
    both = "a fifth of 6 readable rows and half of 19 class images is fewer than the 11 controls"
    assert both in plan(20, 6, 6, 19, 19).notes[0]


def test_what_is_held_out_is_said_with_what_to_train_on():
    assert plan(20, 100, 100).notes == ("20 rows held out as controls: train on picked.train",)
    assert plan(20, 6, 6, 50, 50).notes == (
        "1 row held out as controls: train on picked.train",
        "19 class images held out as controls: train on picked.class_train",
    )
    alone = plan(20, 4, 4, 50, 50).notes
    assert alone[0] == "20 class images held out as controls: train on picked.class_train"
    assert "learned cannot be told from stored" in alone[1]
    assert "5 pictures of it or more" in alone[1]


def test_groups_may_leave_too_few():
    found = plan(20, readable=100, ordinary=9)
    assert found.number == 0
    assert "only 9 of 100 readable rows are in no group, and judging takes 11 controls" in found.notes[0]
    assert plan(20, readable=100, ordinary=12).number == 12


def test_no_controls_are_a_choice():
    assert plan(0, 1000, 1000, 50, 50) == Plan(notes=(f"no controls were asked for: {WITHOUT}",))


def test_class_images_that_cannot_be_read_are_passed_over():
    images = plain_rows(30)
    real = images.image

    def image(row):
        if row < 15:
            raise RowError("broken")
        return real(row)

    images.image = image
    found = readable_rows(images, 20, np.random.default_rng(0))
    assert sorted(found) == list(range(15, 30))
    assert len(readable_rows(images, 4, np.random.default_rng(0))) == 4
    assert plan(20, 6, 6, 30, len(found)).class_number == 15
