"""``memwatch.pick``: a pure function of the rows and the seed, which reads raw rows and draws from no global stream."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from support.picked import (
    chosen,
    duplicates,
    hugging_face,
    part,
    photo,
    plain_rows,
    save_folder,
    shade,
    surveyed,
    with_logo,
)
from torch.utils.data import Dataset, Subset

import memwatch
import memwatch.judge.statistic
from memwatch import ConfigError, Picked, Probe
from memwatch.measure.images import decoded
from memwatch.picking.mix import Why, ordinary_rows
from memwatch.picking.pick import BY_HAND, MIN_CONTROLS, WITHOUT, held_out, in_proportion, plan
from memwatch.picking.rows import as_training_set
from memwatch.picking.training_set import content_key

NUMBER = 60
PHOTOS = [photo(i, 32) for i in range(NUMBER)]
TEXTS = [f"a photo of number {i}" for i in range(NUMBER)]
ROWS = [{"image": p, "text": t, "row": i} for i, (p, t) in enumerate(zip(PHOTOS, TEXTS, strict=True))]
KINDS = ["list", "tuple", "folder", "subset", "torch", "hugging face"]


class Pairs(Dataset):
    """A data set as people write it."""

    def __len__(self):
        return NUMBER

    def __getitem__(self, i):
        return PHOTOS[i], TEXTS[i]


def source_of(kind: str, folder):
    if kind == "folder":
        pictures = {f"{i:02d}.png": p for i, p in enumerate(PHOTOS)}
        return save_folder(folder / "train", pictures, dict(zip(pictures, TEXTS, strict=True)))
    if kind == "hugging face":
        return hugging_face(image=PHOTOS, text=TEXTS)
    return {"list": ROWS, "tuple": tuple(ROWS), "torch": Pairs(), "subset": Subset([*ROWS, *ROWS], range(NUMBER))}[kind]


def numbers(picked: Picked):
    rows = picked.held_out, picked.rotation, picked.notes, picked.train_rows, picked.class_held_out
    return [[(w.row, w.why, w.group) for w in picked.watched], *rows]


def streams():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def shown(row) -> str:
    """The hash of the picture that is, or is in, a row of any kind or a probe."""
    if isinstance(row, dict | tuple):
        row = row["image"] if isinstance(row, dict) else row[0]
    return content_key(decoded(row.image if isinstance(row, Probe) else row))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_and_seed_give_the_same_answer_without_a_global_random_number(kind, tmp_path, monkeypatch):
    source = source_of(kind, tmp_path)
    of_any_other_kind = numbers(memwatch.pick(list(zip(PHOTOS, TEXTS, strict=True)), probes=8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = streams()
    for _ in ("surveyed", "read from the cache"):
        picked = memwatch.pick(source, probes=8)
        assert numbers(picked) == of_any_other_kind
    assert all(a != b for a, b in zip(numbers(memwatch.pick(source, seed=1))[:4], of_any_other_kind, strict=False))
    assert memwatch.pick(source, class_images=PHOTOS[:30]).control_keys
    assert streams() == before
    train = picked.train
    assert picked.train is train
    assert type(train) is {"folder": list, "torch": Subset}.get(kind, type(source))
    assert [shown(train[i]) for i in range(len(train))] == [shown(PHOTOS[row]) for row in picked.train_rows]
    assert [shown(probe) for probe in picked.controls()] == [shown(PHOTOS[row]) for row in picked.held_out]
    assert sorted([*picked.train_rows, *picked.held_out]) == list(range(NUMBER))
    assert len(picked.held_out) == 12  # one in five


def test_no_transformed_row_is_read():
    calls = []
    source = hugging_face(image=PHOTOS, text=TEXTS)
    source = source.with_transform(lambda rows: calls.append(rows) or {"pixel_values": [0] * len(rows["text"])})
    picked = memwatch.pick(source)
    assert [p.prompt for p in picked.probes()] == [TEXTS[w.row] for w in picked.watched]
    assert len(picked.controls()) == 12
    assert calls == []
    assert picked.train[0] == {"pixel_values": 0}  # the loop's own transform is still there


def test_duplicates_are_watched_and_none_of_them_is_a_control(tmp_path):
    pictures = {f"{i:03d}.png": photo(i) for i in range(60)} | {f"copy{i}.png": photo(7) for i in range(5)}
    pictures |= {f"logo{i}.png": with_logo(photo(100 + i)) for i in range(6)}
    picked = memwatch.pick(save_folder(tmp_path / "train", pictures))
    (found,) = [p for p in picked.watched if p.why is Why.DUPLICATES]
    assert {picked.rows.name(row) for row in found.group.rows} == {"007.png", *(f"copy{i}.png" for i in range(5))}
    held = {picked.rows.name(row) for row in picked.held_out}
    assert len(held) == 14
    assert not [name for name in held if name == "007.png" or name.startswith(("copy", "logo"))]
    assert all(probe.image == tmp_path / "train" / probe.name for probe in picked.probes())  # files stay files


def test_dreambooth_holds_out_one_sibling_and_class_images():
    """A control is never trained on: neither the sibling nor one of the class images."""
    prompts = {"prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    picked = memwatch.pick(PHOTOS[:6], class_images=[photo(500 + i, 32) for i in range(50)], **prompts)
    controls = picked.controls()
    assert (len(picked.held_out), len(picked.class_held_out)) == (1, 19)
    classes = [f"class-{picked.class_images.name(row)}" for row in picked.class_held_out]
    assert [(c.row, c.name, c.prompt) for c in controls] == [
        (picked.held_out[0], picked.rows.name(picked.held_out[0]), "a photo of sks dog"),
        *((None, name, "a photo of a dog") for name in classes),
    ]
    assert list(picked.control_keys) == [c.name for c in controls]
    assert {p.prompt for p in picked.probes()} == {"a photo of sks dog"}
    trained_on = {shown(row) for row in (*picked.train, *picked.class_train)}
    assert len(trained_on) == 5 + 31
    assert trained_on.isdisjoint(shown(control) for control in controls)


@pytest.fixture
def survey():
    """200 rows: near-duplicates, a shared part, and one row that cannot be read."""
    return surveyed(200, duplicates(*range(9)), part(*range(10, 30)), unreadable={199: "broken"})


def test_every_row_has_one_role(survey):
    picked = chosen(survey)
    watched = [p.row for p in picked.watched]
    everything = [*watched, *picked.held_out, *picked.rotation]
    assert len(everything) == len(set(everything))
    assert (len(watched), len(picked.held_out)) == (16, 20)
    assert {p.why for p in picked.watched} >= {Why.DUPLICATES, Why.PART, Why.STRANGE, Why.TYPICAL, Why.RANDOM}
    assert {*range(9), *range(10, 30)}.isdisjoint(picked.held_out)
    assert 199 not in everything  # it cannot be read
    assert 199 in picked.train_rows  # what becomes of it is the loader's business
    assert picked.groups_with(12) == (survey.groups[0],)
    assert picked.groups_with(150) == picked.unwatched_groups == ()


def test_probes_hold_caption_picture_and_row(survey):
    picked = chosen(survey)
    probe, row = picked.probes()[0], picked.watched[0].row
    assert (probe.prompt, probe.name, probe.row) == (f"a photo of number {row}", f"row-{row:05d}", row)
    assert np.array_equal(probe.image, shade(row))
    assert not any(p.in_rotation for p in (*picked.probes(), *picked.controls()))
    assert [(p.row, p.in_rotation) for p in picked.rotation_probes(30)] == [(row, True) for row in picked.rotation[:30]]


@pytest.mark.parametrize(
    ("survey", "budget", "watched", "held"),
    [(surveyed(60), 60, 48, 12), (surveyed(60, duplicates(*range(60))), 16, 1, 0)],
)
def test_fewer_are_watched_than_asked_for(survey, budget, watched, held):
    """So that enough rows are left for controls, or because all are near-duplicates."""
    picked = chosen(survey, probes=budget)
    assert (len(picked.held_out), len(picked.watched)) == (held, watched)
    assert any(f"{watched} row{'s' * (watched > 1)} picked, where {budget} were asked" in note for note in picked.notes)


def test_notes_say_what_was_found_and_what_was_not_searched(survey):
    many = surveyed(200, *(duplicates(2 * i, 2 * i + 1) for i in range(10)), notes=("searched in 50 rows",))
    said = " | ".join(note for found in (survey, many) for note in chosen(found, probes=2).notes)
    for expected in (
        "200 training rows, 2 of them watched",
        "1 group of near-duplicates and 1 shared part, in 29 rows",
        "1 row unreadable, so not looked at: row-00199",
        "20 rows held out as controls: train on picked.train (memwatch pick: OUT/train)",
        "searched in 50 rows",
        "10 groups of near-duplicates and 0 shared parts, in 20 rows; of 8 of them no row is watched",
    ):
        assert expected in said


def held(survey, watched, number, seed=0):
    return held_out(survey, ordinary_rows(survey), watched, number, np.random.default_rng(seed))


BOTH = r"^nothing is held out: at most one in 5 of 6 readable rows \(6 in no group\) and half of 19 class images may be"


@pytest.mark.parametrize(
    ("asked", "rows", "ordinary", "class_images", "held", "said"),
    [
        (20, 1000, 900, 0, (20, 0), r"^20 rows held out as controls: train on picked.train \(memwatch pick: OUT/t"),
        (20, 99, 99, 0, (19, 0), ""),
        (20, 100, 12, 0, (12, 0), ""),
        (20, 100, 9, 0, (0, 0), rf"\(9 in no group\) may be, and judging takes 11 .*; {re.escape(BY_HAND)}$"),
        (20, 55, 55, 0, (11, 0), ""),
        (20, 54, 54, 0, (0, 0), ""),  # one row in five, and never fewer than eleven
        (20, 6, 6, 50, (1, 19), "^1 row held out as .*19 class images held out .*: train on picked.class_train"),
        (20, 6, 6, 20, (1, 10), ""),
        (20, 6, 6, 19, (0, 0), f"{BOTH}, and judging takes 11 controls; without controls {WITHOUT}"),
        (20, 4, 4, 22, (0, 11), "so that learned cannot be told from memorized; that takes 5 pictures of it or more"),
        (20, 4, 4, 21, (0, 0), ""),  # half of the class images
        (20, 60, 60, 50, (12, 8), ""),
        (0, 1000, 1000, 50, (0, 0), f"^no controls were asked for: {WITHOUT}$"),
    ],
)
def test_how_many_are_held_out_and_what_is_said(asked, rows, ordinary, class_images, held, said):
    planned = plan(asked, rows, ordinary, class_images, min(asked, class_images))
    assert planned[:2] == held
    assert re.search(said, "; ".join(planned[2]))
    assert MIN_CONTROLS == memwatch.judge.statistic.MIN_CONTROLS == 11


def test_captions_give_in_proportion():
    survey = surveyed(120, captions=(tuple(range(60)), tuple(range(60, 90))))
    out = held(survey, watched=[], number=20)
    assert [sum(a <= row < b for row in out) for a, b in ((0, 60), (60, 90), (90, 120))] == [10, 5, 5]
    assert in_proportion({0: 1, 1: 1, 2: 1}, 2) == {0: 1, 1: 1, 2: 0}
    assert in_proportion({0: 3, 1: 2}, 9) == {0: 3, 1: 2}
    assert in_proportion({}, 3) == {}


def test_a_caption_of_five_rows_gives_a_sibling_of_its_watched_row():
    captions = (*(tuple(range(5 * i, 5 * i + 5)) for i in range(40)), tuple(range(200, 204)))
    survey, watched = surveyed(1000, captions=captions), [3, 52, 199, 201]
    for seed in range(5):
        out = held(survey, watched, 10, seed)
        assert all(set(captions[i]) & set(out) for i in (0, 10, 39))
    assert {row // 5 for row in held(survey, watched, 2)} < {0, 10, 39}  # as far as the number goes


def test_a_caption_of_a_template_gives_its_rest_last():
    """Rows 0 to 9 share a caption, and all but two a part: those two may show it unnoticed."""
    survey = surveyed(40, part(*range(8)), captions=(tuple(range(10)),))
    assert not {8, 9} & set(held(survey, watched=[0], number=20))
    assert {8, 9} <= set(held(survey, watched=[0], number=32))


def test_class_images_that_cannot_be_read_are_passed_over():
    images = plain_rows(30)
    images.source[:8] = [("broken", "")] * 8
    picked = chosen(surveyed(6), class_images=images)
    assert len(picked.class_held_out) == 15
    assert min(picked.class_held_out) >= 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"probes": -1}, "'probes': got -1, allowed: 0 or greater"),
        ({"probes": 2.5}, "'probes': got 2.5, allowed: 0 or greater"),
        ({"controls": 10}, "'controls': got 10, allowed: 11 or greater, as judging takes, or 0 for none"),
        ({"controls": ["a.png"]}, r"'controls': got \['a.png'\]"),
        ({"seed": -1}, "'seed': got -1, allowed: 0 or greater"),
        ({"seed": "0"}, "'seed': got '0'"),
    ],
)
def test_a_wrong_number_is_named_with_what_is_allowed(wrong, said):
    with pytest.raises(ConfigError, match=said):
        memwatch.pick(ROWS, **wrong)


def test_none_may_be_asked_for():
    picked = memwatch.pick(ROWS, probes=0, controls=0)
    assert (picked.watched, picked.held_out, len(picked.train), picked.class_train) == ((), (), NUMBER, None)
    assert len(memwatch.pick(as_training_set(ROWS), probes=0).controls()) == 12


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (
            lambda: hugging_face(image=PHOTOS[:12], de=["x"] * 12),
            "the columns are image, de; set caption_column to one",
        ),
        (lambda: hugging_face(image=PHOTOS[:12], text=[None] * 12), "captions are read from 'text'"),
        (lambda: [{"image": p, "label": 1} for p in PHOTOS[:12]], "the columns are image, label; set caption_column"),
        (lambda: PHOTOS[:12], "memwatch looks at them under the empty caption"),
    ],
)
def test_missing_captions_are_said_once_with_counts(source, found, caplog):
    memwatch.pick(source(), controls=0)
    assert [message for message in caplog.messages if "caption" in message] == caplog.messages[:1]
    assert caplog.messages[0].startswith("12 of 12 rows have no caption; ")
    assert found in caplog.messages[0]
    caplog.clear()
    memwatch.pick(source(), controls=0, prompt="a photo")
    assert caplog.messages == []


def test_one_column_of_captions_is_found_by_its_name():
    rows = hugging_face(image=PHOTOS[:12], en_text=[[text, "other"] for text in TEXTS[:12]])
    assert {p.prompt for p in memwatch.pick(rows, probes=12, controls=0).probes()} == {*TEXTS[:12]}


@pytest.mark.parametrize("shared", [range(60), range(50), range(40)])
def test_a_part_of_the_whole_set_does_not_stop_controls(shared):
    """Rows in no group come first; near-duplicates are never held out."""
    picked = chosen(surveyed(60, part(*shared), duplicates(1, 2)))
    alone = set(range(60)) - set(shared)
    assert len(picked.held_out) == 12
    assert {1, 2}.isdisjoint(picked.held_out)
    assert len(picked.watched) == 16
    assert (alone >= set(picked.held_out)) == (len(alone) >= 12)
    assert any("share a part are held out as well" in note for note in picked.notes) == (len(alone) < 12)
