"""The survey as a whole: groups in order, captions, strangeness, a digest, and pictures known again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import operator
import random
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.picked import photo, save_folder, with_logo

from memwatch import picking
from memwatch.measure.probes import ProbeError
from memwatch.picking import survey as module
from memwatch.picking.duplicates import coarse
from memwatch.picking.hashes import hashes_of
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import BLOCK, GroupKind, Survey, matches, strangeness, survey
from memwatch.picking.survey_file import read_survey, write_survey


def look(pictures, captions=None, **settings):
    texts = captions or [f"picture {i}" for i in range(len(pictures))]
    return survey(as_training_set(list(zip(pictures, texts, strict=True))), progress=False, **settings)


def test_groups_come_largest_first():
    pictures = [photo(i) for i in range(12)]
    pictures += [with_logo(photo(20 + i)) for i in range(5)] + [photo(0)] * 4 + [photo(1)]
    found = look(pictures)
    assert found.size == len(found.bits) == 22
    assert [(group.kind, group.rows) for group in found.groups] == [
        (GroupKind.DUPLICATES, (0, 17, 18, 19, 20)),
        (GroupKind.PART, (12, 13, 14, 15, 16)),
        (GroupKind.DUPLICATES, (1, 21)),
    ]
    assert found.groups[0].boxes == ((0, 0, 1, 1),) * 5
    left, top, right, bottom = found.groups[1].boxes[0]
    assert 0 <= left < right < 0.5
    assert 0 <= top < bottom < 0.5
    assert found.unreadable == {}


def test_captions():
    found = look([photo(i) for i in range(5)], ["a cat", "a dog", "A  CAT", "a quokka in the rain", "a dog and a cat"])
    assert found.captions == ((0, 2),)
    assert found.rare_captions[0] == 3


def test_unreadable_rows_are_counted_and_nothing_else_suffers(tmp_path):
    folder = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(4)})
    (folder / "5.png").write_bytes(b"")
    (folder / "6.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    found = survey(as_training_set(folder), progress=False)
    assert list(found.unreadable) == [4, 5]
    assert all(name in why for name, why in zip(("5.png", "6.jpg"), found.unreadable.values(), strict=True))
    assert found.groups == ()
    assert np.isnan(found.strangeness).tolist() == [False] * 4 + [True] * 2


def test_nothing_that_can_be_read_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(ProbeError, match="none of the 3 images can be read; the first: row 0 .*0.png"):
        survey(as_training_set(tmp_path), progress=False)


def test_strangeness_is_the_distance_to_the_nearest_three():
    colours = [0, 10, 20, 30, 200]
    found = look([Image.new("RGB", (64, 64), (c, c, c)) for c in colours])
    expected = [np.mean(sorted(abs(c - d) for j, d in enumerate(colours) if j != i)[:3]) for i, c in enumerate(colours)]
    assert found.strangeness == pytest.approx(expected, abs=0.05)


def test_strangeness_of_more_rows_than_a_block_and_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    three = hashes_of([Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(3)])
    numbers = rng.permutation(np.arange(BLOCK + 40) % 3)
    many = type(three)(*(field[numbers] for field in vars(three).values()))
    assert strangeness(many).max() < 0.05  # each has three others that are the same
    monkeypatch.setattr(module, "OTHERS", 40)
    assert strangeness(many).max() < 0.05  # also among those that are drawn
    assert look([photo(0)]).strangeness.tolist() == [0.0]


def test_given_pictures_are_known_again():
    rows = as_training_set([*(photo(i) for i in range(8)), photo(3), {}])
    found = survey(rows, progress=False)
    given = [photo(20), photo(3).resize((50, 50)), ImageOps.mirror(photo(5)), Image.new("RGB", (64, 64)), photo(0)]
    assert matches(given, found, rows) == [None, 3, 5, None, 0]
    assert matches([], found, rows) == []


def test_small_sets_start_no_process(monkeypatch):
    monkeypatch.setattr("memwatch.picking.hashes.in_workers", None)
    assert look([photo(i) for i in range(3)]).size == 3
    assert not multiprocessing.active_children()


def test_strangeness_is_exact_up_to_a_number_of_rows_and_near_it_above(monkeypatch):
    hashes = hashes_of([photo(i) for i in range(60)])
    exact = strangeness(hashes)
    small = coarse(hashes.thumbnails).astype(float)
    apart = np.sqrt(((small[:, None] - small) ** 2).mean(-1))
    assert exact == pytest.approx(np.sort(apart, axis=1)[:, 1:4].mean(1), rel=1e-3)
    monkeypatch.setattr(module, "OTHERS", 30)
    assert (strangeness(hashes) >= exact - 1e-3).all()  # there are fewer to be near
    assert np.corrcoef(strangeness(hashes), exact)[0, 1] > 0.5


def test_no_more_rows_are_read_than_may_be_for_a_picture(monkeypatch):
    rows = as_training_set([Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in range(20, 220, 20)])
    found = survey(rows, progress=False)
    monkeypatch.setattr(module, "CANDIDATES", 4)
    read = []
    monkeypatch.setattr(rows, "image", lambda row: read.append(row) or Image.new("RGB", (64, 64)))
    assert matches([Image.new("RGB", (64, 64), "white")], found, rows) == [None]
    assert read == [0, 1, 2, 3]


def test_nothing_is_kept_of_the_pictures_but_their_bits():
    found = look([photo(i) for i in range(30)])
    assert found.bits.base is None  # else it would hold what it is a part of
    assert sum(getattr(found, field.name).nbytes for field in fields(Survey) if field.type == "np.ndarray") == 30 * 16


def test_nobody_s_random_numbers_are_drawn_and_the_answer_is_always_the_same(monkeypatch):
    monkeypatch.setattr(module, "OTHERS", 20)
    monkeypatch.setattr(module, "SAMPLE", 20)
    monkeypatch.setattr("memwatch.picking.parts.SAMPLE", 20)
    pictures = [with_logo(photo(i)) for i in range(25)] + [photo(i) for i in range(20)]
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    first = look(pictures)
    now = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    assert first.sampled == 20
    assert states[0] == now[0]
    assert str(states[1]) == str(now[1])
    assert torch.equal(states[2], now[2])
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert same(look(pictures), first)


def same(a: Survey, b: Survey) -> bool:
    """Whether two surveys are equal in everything."""
    bare = [replace(survey, bits=None, strangeness=None) for survey in (a, b)]
    return (
        bare[0] == bare[1]
        and np.array_equal(a.bits, b.bits)
        and np.array_equal(a.strangeness, b.strangeness, equal_nan=True)
    )


def test_a_file_gives_the_survey_back(tmp_path):
    pictures = [with_logo(photo(i)) for i in range(6)] + [photo(10), photo(10), {}]
    found = look(pictures, ["a cat"] * 4 + [f"number {i} of a quokka" for i in range(5)])
    assert len(found.groups) == 2
    file = tmp_path / "deep" / "survey.json"
    write_survey(file, found)
    assert same(read_survey(file), found)
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    rewritten = file.read_bytes()
    write_survey(file, read_survey(file))
    assert file.read_bytes() == rewritten


def test_a_file_that_cannot_be_read_is_none(tmp_path, caplog):
    file = tmp_path / "survey.json"
    assert read_survey(file) is None
    write_survey(file, look([photo(0), photo(0)]))
    saved = json.loads(file.read_text(encoding="utf-8"))
    for text in ("", "[]", "{", json.dumps(saved)[:-20], json.dumps(saved | {"survey": saved["survey"] | {"size": 3}})):
        file.write_text(text, encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "memwatch"):
            assert read_survey(file) is None
        assert "surveyed anew" in caplog.text
    file.write_text(json.dumps(saved | {"version": 0}), encoding="utf-8")
    assert read_survey(file) is None


def test_the_work_grows_as_the_rows_do(monkeypatch):
    for name in ("memwatch.picking.survey.OTHERS", "memwatch.picking.survey.SAMPLE", "memwatch.picking.parts.SAMPLE"):
        monkeypatch.setattr(name, 30)
    work = Counter()

    def counted(name, function, number):
        def call(*args):
            work[name] += number(*args)
            return function(*args)

        return call

    for name in ("same_place.checked", "moved.checked", "elsewhere.checked", "duplicates.bits_apart"):
        function = operator.attrgetter(name)(picking)
        monkeypatch.setattr(f"memwatch.picking.{name}", counted(name, function, lambda a, b, *_: len(a)))
    distances = counted("distances", module._squared_distances, lambda a, b: len(a) * len(b))
    monkeypatch.setattr(module, "_squared_distances", distances)
    pictures = [with_logo(photo(i)) if i % 3 == 0 else photo(i) for i in range(180)]
    look(pictures[:90])
    once = dict(work)
    work.clear()
    look(pictures)
    assert all(work[name] <= 3 * once[name] + 100 for name in work), (once, work)  # all against all is 4 times
    assert len(work) == 5
