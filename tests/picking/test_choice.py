"""The choice: who is watched, who is held out, who has a turn; the same from the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.picked import duplicates, part, photo, plain_rows, save_folder, shade, surveyed, with_logo

from memwatch.config import ConfigError, PickConfig
from memwatch.measure.probes import Probe, ProbeError
from memwatch.picking.boxes import inside
from memwatch.picking.choice import Why, choose, choose_from
from memwatch.picking.members import best_members

ONE = PickConfig(workers=1)


def chosen(survey, *, budget=16, seed=0, rows=None, **pick):
    given = {key: pick.pop(key) for key in ("controls", "peers") if key in pick}
    rows = rows if rows is not None else plain_rows(survey.size)
    return choose_from(rows, survey, PickConfig(**pick), budget=budget, seed=seed, **given)


@pytest.fixture
def survey():
    """200 rows: near-duplicates, a shared part, and one row that cannot be read."""
    return surveyed(200, duplicates(*range(9)), part(*range(10, 30)), unreadable={199: "broken"})


def test_every_row_has_one_part_to_play(survey):
    choice = chosen(survey)
    watched = [p.row for p in choice.picked]
    everything = [*watched, *choice.held_out, *choice.peers, *choice.turns]
    assert len(everything) == len(set(everything))
    assert (len(watched), len(choice.held_out), len(choice.peers)) == (16, 20, 8)
    assert {p.why for p in choice.picked} >= {Why.DUPLICATES, Why.PART, Why.STRANGE, Why.TYPICAL, Why.RANDOM}
    grouped = set(range(9)) | set(range(10, 30))
    assert grouped.isdisjoint(choice.held_out)
    assert grouped.isdisjoint(choice.peers)
    assert choice.training_indices == [row for row in range(200) if row not in set(choice.held_out)]
    assert 199 in choice.training_indices  # what becomes of it is the loader's business
    assert choice.behind(12) == (survey.groups[0],)
    assert choice.behind(150) == ()
    assert choice.without_place == ()


def test_turns_are_cut_at_the_rotation(survey):
    assert len(chosen(survey, rotation=30).turns) == 30
    assert chosen(survey, rotation=0).turns == ()


def test_the_same_seed_gives_the_same_choice(survey):
    def numbers(seed):
        choice = chosen(survey, seed=seed)
        return choice.picked, choice.held_out, choice.peers, choice.turns

    assert numbers(3) == numbers(3)
    assert all(a != b for a, b in zip(numbers(3), numbers(4), strict=True))


def test_probes_hold_caption_picture_and_row(survey):
    choice = chosen(survey)
    probe, row = choice.probes()[0], choice.picked[0].row
    assert (probe.prompt, probe.name, probe.row) == (f"a photo of number {row}", f"row-{row:05d}", row)
    assert np.array_equal(np.asarray(probe.image), np.asarray(shade(row)))
    assert not any(p.takes_turns for p in (*choice.probes(), *choice.controls(), *choice.peer_probes()))
    assert all(p.takes_turns for p in choice.turn_probes())
    assert [p.row for p in choice.turn_probes()] == list(choice.turns)
    assert [p.row for p in choice.controls()] == list(choice.held_out)


def test_files_stay_files(tmp_path):
    folder = save_folder(tmp_path / "train", {f"deep/{i}.png": photo(i) for i in range(6)})
    choice = choose(folder, ONE)
    for probe in choice.probes():
        assert probe.image == folder / probe.name
        assert probe.image.is_file()


def test_a_budget_that_leaves_too_few_rows_for_controls_is_cut():
    choice = chosen(surveyed(60), budget=60)
    assert len(choice.held_out) == 12
    assert len(choice.picked) == 48
    assert any("48 rows picked, where 60 were asked for" in note for note in choice.notes)


def test_a_small_set_is_watched_as_a_whole():
    choice = chosen(surveyed(6))
    assert {p.row for p in choice.picked} == set(range(6))
    assert (choice.held_out, choice.peers, choice.turns) == ((), (), ())
    assert choice.controls() == []


def test_pictures_set_aside_join_class_images():
    rows = plain_rows(6)
    rows.class_images = plain_rows(40, ["a photo of a dog"] * 40)
    choice = chosen(surveyed(6), rows=rows, set_aside=2)
    controls = choice.controls()
    assert len(choice.held_out) == 2
    assert set(choice.held_out).isdisjoint({p.row for p in choice.picked})
    assert [c.row for c in controls[:2]] == list(choice.held_out)
    assert len(controls) == 20
    assert {(c.prompt, c.row) for c in controls[2:]} == {("a photo of a dog", None)}
    assert len({c.name for c in controls}) == 20


def test_all_rows_near_duplicates_leave_one_probe_and_no_control():
    choice = chosen(surveyed(100, duplicates(*range(100))))
    assert [p.why for p in choice.picked] == [Why.DUPLICATES]
    assert choice.held_out == ()
    assert any("0 rows are in no group" in note for note in choice.notes)
    assert len(choice.turns) == 0  # all are one picture


def test_no_probes_where_they_are_given(survey):
    choice = chosen(survey, budget=0)
    assert choice.probes() == []
    assert len(choice.controls()) == 20


def test_given_peers_take_the_place_of_drawn_ones(survey):
    given = [Probe("mine", shade(1), name="mine")]
    choice = chosen(survey, peers=given)
    assert choice.peers == ()
    assert choice.peer_probes() == given


def test_notes_say_what_is_not_looked_at(survey):
    said = " | ".join(chosen(survey, rotation=10, budget=2).notes)
    assert "200 training rows: 2 watched, 10 taking turns, 159 not looked at" in said
    assert "1 group of near-duplicates and 1 shared part, in 29 rows" in said
    assert "1 row unreadable, so not looked at: row-00199" in said
    assert "20 rows held out as controls: leave them out of training" in said


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
    assert [p.row for p in chosen(surveyed(60, shared), budget=1).picked] == [2]


def test_a_box_of_fractions_covers_what_it_touches():
    assert inside((0.0, 0.25, 0.5, 0.5), 8).sum() == 4 * 2
    assert inside((0.05, 0.0, 0.3, 1.0), 8).sum() == 3 * 8


# --- from pictures ---------------------------------------------------------------------------------------------------


def test_planted_duplicates_of_a_folder_are_picked(tmp_path):
    pictures = {f"{i:03d}.png": photo(i) for i in range(40)}
    pictures |= {f"copy{i}.png": photo(7) for i in range(5)}
    choice = choose(save_folder(tmp_path / "train", pictures), ONE)
    (found,) = [p for p in choice.picked if p.why is Why.DUPLICATES]
    names = {choice.rows.name(row) for row in found.group.rows}
    assert names == {"007.png", *(f"copy{i}.png" for i in range(5))}
    assert names.isdisjoint(choice.rows.name(row) for row in choice.held_out)
    assert choose(choice) is choice


def test_controls_that_are_trained_on_are_named_and_left_out(tmp_path):
    rows = [(photo(i), f"number {i}") for i in range(30)]
    seen = photo(4).resize((80, 80), Image.Resampling.LANCZOS)
    given = [Probe("new", photo(100), name="new"), Probe("seen", seen, name="seen"), Probe("a prompt", name="prompt")]
    choice = choose(rows, ONE, controls=given)
    assert [c.name for c in choice.controls()] == ["new", "prompt"]
    assert choice.held_out == ()
    said = " | ".join(choice.notes)
    assert "1 of 3 given controls left out, because training rows are near-duplicates of them" in said
    assert "seen (row-00004)" in said
    assert "too few controls (2)" in said


def test_controls_that_cannot_be_read_are_left_to_whoever_encodes_them(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    choice = choose([(photo(i), "") for i in range(6)], ONE, controls=[Probe("", tmp_path / "broken.png", name="b")])
    assert [c.name for c in choice.controls()] == ["b"]


def test_unreadable_files_cost_only_themselves(tmp_path):
    folder = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(8)})
    (folder / "5.png").write_bytes(b"no picture")
    choice = choose(folder, ONE)
    assert {choice.rows.name(p.row) for p in choice.picked} == {f"{i}.png" for i in range(8) if i != 5}
    assert any("1 row unreadable, so not looked at: 5.png" in note for note in choice.notes)


def test_bad_input_is_one_clear_error(tmp_path):
    with pytest.raises(ProbeError, match="holds no image"):
        choose(tmp_path)
    with pytest.raises(ConfigError, match="'probes': got -1"):
        choose([(photo(0), "")], ONE, probes=-1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ProbeError):
        choose(tmp_path, ONE)


def test_a_set_without_captions_and_a_budget_of_one(tmp_path):
    folder = save_folder(tmp_path / "train", {f"{i}.png": with_logo(photo(i)) for i in range(12)})
    choice = choose(folder, ONE, probes=1)
    assert len(choice.picked) == 1
    assert choice.probes()[0].prompt == ""
