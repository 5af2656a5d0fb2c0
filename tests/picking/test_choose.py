"""The choice: who is watched, who is held out, who has a turn; the same from the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.picked import chosen, duplicates, part, shade, surveyed

from memwatch.picking.boxes import inside
from memwatch.picking.choose import PEERS
from memwatch.picking.mix import Why
from memwatch.picking.representatives import best_members
from memwatch.picking.rows import as_training_set


@pytest.fixture
def survey():
    """200 rows: near-duplicates, a shared part, and one row that cannot be read."""
    return surveyed(200, duplicates(*range(9)), part(*range(10, 30)), unreadable={199: "broken"})


def test_every_row_has_one_part_to_play(survey):
    picked = chosen(survey)
    watched = [p.row for p in picked.watched]
    everything = [*watched, *picked.held_out, *picked.peers, *picked.rotation]
    assert len(everything) == len(set(everything))
    assert (len(watched), len(picked.held_out), len(picked.peers)) == (16, 20, PEERS)
    assert {p.why for p in picked.watched} >= {Why.DUPLICATES, Why.PART, Why.STRANGE, Why.TYPICAL, Why.RANDOM}
    grouped = set(range(9)) | set(range(10, 30))
    assert grouped.isdisjoint(picked.held_out)
    assert grouped.isdisjoint(picked.peers)
    assert picked.train_rows == [row for row in range(200) if row not in set(picked.held_out)]
    assert 199 in picked.train_rows  # what becomes of it is the loader's business
    assert picked.groups_with(12) == (survey.groups[0],)
    assert picked.groups_with(150) == ()
    assert picked.unwatched_groups == ()


def test_the_same_seed_gives_the_same_choice(survey):
    def numbers(seed):
        picked = chosen(survey, seed=seed)
        return picked.watched, picked.held_out, picked.peers, picked.rotation

    assert numbers(3) == numbers(3)
    assert all(a != b for a, b in zip(numbers(3), numbers(4), strict=True))


def test_probes_hold_caption_picture_and_row(survey):
    picked = chosen(survey)
    probe, row = picked.probes()[0], picked.watched[0].row
    assert (probe.prompt, probe.name, probe.row) == (f"a photo of number {row}", f"row-{row:05d}", row)
    assert np.array_equal(np.asarray(probe.image), np.asarray(shade(row)))
    assert not any(p.in_rotation for p in (*picked.probes(), *picked.controls(), *picked.peer_probes()))
    rotation = picked.rotation_probes(30)
    assert all(p.in_rotation for p in rotation)
    assert [p.row for p in rotation] == list(picked.rotation[:30])
    assert [p.row for p in picked.controls()] == list(picked.held_out)


def test_a_budget_that_leaves_too_few_rows_for_controls_is_cut():
    picked = chosen(surveyed(60), probes=60)
    assert len(picked.held_out) == 12
    assert len(picked.watched) == 48
    assert any("48 rows picked, where 60 were asked for" in note for note in picked.notes)


def test_a_small_set_is_watched_as_a_whole():
    picked = chosen(surveyed(6))
    assert {p.row for p in picked.watched} == set(range(6))
    assert (picked.held_out, picked.peers, picked.rotation) == ((), (), ())
    assert picked.controls() == []
    assert picked.class_train is None


def test_class_images_are_held_out_besides_a_sibling():
    """DreamBooth: 6 pictures of the subject, 50 of its class."""
    images = as_training_set([(shade(100 + i), "a photo of a dog") for i in range(50)])
    picked = chosen(surveyed(6), class_images=images)
    controls = picked.controls()
    assert (len(picked.held_out), len(picked.class_held_out), len(controls)) == (1, 19, 20)
    assert set(picked.held_out).isdisjoint({p.row for p in picked.watched})
    assert controls[0].row == picked.held_out[0]
    assert {(c.prompt, c.row) for c in controls[1:]} == {("a photo of a dog", None)}
    assert [c.name for c in controls[1:]] == [f"class-row-{row:05d}" for row in picked.class_held_out]
    assert list(picked.control_keys) == [c.name for c in controls]
    assert len(set(picked.control_keys.values())) == 20
    left = [images.source[row] for row in range(50) if row not in picked.class_held_out]
    assert picked.class_train == left


def test_all_rows_near_duplicates_leave_one_probe_and_no_control():
    picked = chosen(surveyed(100, duplicates(*range(100))))
    assert [p.why for p in picked.watched] == [Why.DUPLICATES]
    assert picked.held_out == ()
    assert any("only 0 of 100 readable rows are in no group" in note for note in picked.notes)
    assert len(picked.rotation) == 0  # all are one picture


def test_no_probes_where_none_are_asked_for(survey):
    picked = chosen(survey, probes=0)
    assert picked.probes() == []
    assert len(picked.controls()) == 20


def test_notes_say_what_is_not_looked_at(survey):
    picked = chosen(survey, probes=2)
    said = " | ".join(picked.notes)
    assert "200 training rows, 2 of them watched" in said
    assert "1 group of near-duplicates and 1 shared part, in 29 rows" in said
    assert "1 row unreadable, so not looked at: row-00199" in said
    assert "20 rows held out as controls: train on picked.train" in said
    many = surveyed(200, *(duplicates(2 * i, 2 * i + 1) for i in range(10)))
    assert "10 groups of near-duplicates and 0 shared parts, in 20 rows; of 8 of them no row is watched" in " | ".join(
        chosen(many, probes=2).notes
    )


def test_of_a_shared_part_the_member_least_like_the_others_is_picked():
    thumbnails = np.zeros((5, 32, 32, 3), np.uint8)
    thumbnails[:, 16:] = 100
    thumbnails[2, 16:] = 250  # its rest differs
    thumbnails[4, :16, :16] = 250  # so does this one, but inside of its part
    shared = part(0, 1, 2, 3, 4)
    shared = replace(shared, best=best_members(thumbnails, shared.rows, shared.boxes))
    assert shared.best_first[0] == 2
    assert sorted(shared.best_first) == [0, 1, 2, 3, 4]
    assert duplicates(3, 1).best_first[0] == 3


def test_a_box_of_fractions_covers_what_it_touches():
    assert inside((0.0, 0.25, 0.5, 0.5), 8).sum() == 4 * 2
    assert inside((0.05, 0.0, 0.3, 1.0), 8).sum() == 3 * 8
