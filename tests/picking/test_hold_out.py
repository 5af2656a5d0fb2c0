"""Controls: which rows are held out, and what is said where that is not possible."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.picked import duplicates, part, plain_rows, surveyed

from memwatch.config import PickConfig
from memwatch.picking.hold_out import held_out, in_proportion, plan
from memwatch.picking.mix import ordinary_rows
from memwatch.picking.rows import RowError


def planned(readable, *, ordinary=None, given=None, class_images=None, **pick):
    rows = SimpleNamespace(class_images=class_images)
    rng = np.random.default_rng(0)
    return plan(rows, readable, readable if ordinary is None else ordinary, PickConfig(**pick), given, rng)


def held(survey, watched, number, seed=0):
    return held_out(survey, ordinary_rows(survey), watched, number, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("readable", "asked", "number"), [(1000, 20, 20), (100, 20, 20), (99, 20, 19), (55, 20, 11), (54, 20, 0)]
)
def test_a_fifth_of_a_small_set_at_most(readable, asked, number):
    assert planned(readable, hold_out=asked).number == number


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
    found = planned(6)
    assert (found.number, found.class_rows) == (0, ())
    said = " ".join(found.notes)
    assert "a fifth of 6 readable rows is fewer than the 11 controls that judging takes" in said
    assert "class (prior preservation) images are controls" in said
    assert "augmented views of training pictures are none" in said
    assert "pick.set_aside: 2" in said
    assert "siblings" in said


def test_rows_set_aside_are_no_use_without_other_controls():
    found = planned(6, set_aside=2)
    assert found.number == 0
    assert "2 pictures set aside" in found.notes[0]


def test_class_images_are_the_controls_of_a_small_set():
    images = plain_rows(30)
    found = planned(6, class_images=images)
    assert found.number == 0
    assert len(set(found.class_rows)) == 20
    assert "learned cannot be told from stored" in " ".join(found.notes)
    aside = planned(6, class_images=images, set_aside=2)
    assert (aside.number, len(aside.class_rows)) == (2, 18)
    assert "cannot be told" not in " ".join(aside.notes)


def test_too_few_class_images_are_none():
    assert planned(6, class_images=plain_rows(10)).class_rows == ()
    assert planned(6, class_images=plain_rows(9), set_aside=2).number == 2


def test_class_images_that_cannot_be_read_are_passed_over():
    images = plain_rows(30)
    real = images.image

    def image(row):
        if row < 15:
            raise RowError("broken")
        return real(row)

    images.image = image
    assert min(planned(6, class_images=images).class_rows) >= 15


@pytest.mark.parametrize(("readable", "asked", "aside"), [(4, 1, 0), (5, 2, 2), (5, 4, 2), (10, 3, 3), (10, 9, 4)])
def test_two_of_five_pictures_at_most_are_set_aside(readable, asked, aside):
    found = planned(readable, given=20, set_aside=asked)
    assert found.number == aside
    assert ("pick.set_aside is" in " ".join(found.notes)) == (aside < asked)


def test_a_large_set_needs_nothing_set_aside():
    assert planned(1000, set_aside=2).number == 20
    assert planned(1000, set_aside=2, given=20) == plan_of_given()


def plan_of_given():
    return planned(1000, given=20)


def test_groups_may_leave_too_few():
    found = planned(100, ordinary=9)
    assert found.number == 0
    assert "9 rows are in no group" in found.notes[0]
    assert planned(100, ordinary=12).number == 12


def test_no_controls_are_a_choice():
    found = planned(1000, hold_out=0)
    assert found.number == 0
    assert found.notes == ("pick.hold_out is 0, so that there are no controls: " + uncalibrated(),)
    assert "pick.hold_out is 5, and judging takes 11" in planned(1000, hold_out=5).notes[0]


def uncalibrated():
    return "alerts are uncalibrated, and nothing is called memorized"


def test_few_given_controls_are_said():
    assert "too few controls (4)" in planned(1000, given=4).notes[0]
    assert planned(1000, given=11).notes == ()
