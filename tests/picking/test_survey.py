"""The survey as a whole: groups in order, captions, and how unusual each picture is."""

from __future__ import annotations

import math
import operator
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support.picked import hashes_of, photo, same_survey, save_folder, with_logo

from memwatch import picking
from memwatch.measure.captions import ProbeError
from memwatch.picking import survey as module
from memwatch.picking.duplicates import coarse
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import BLOCK, GroupKind, best_members, strangeness, survey


def look(pictures, captions=None):
    texts = captions or [f"picture {i}" for i in range(len(pictures))]
    return survey(as_training_set(list(zip(pictures, texts, strict=True))))


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


def test_unreadable_rows_are_counted_and_nothing_else_suffers(tmp_path):
    folder = save_folder(tmp_path / "train", {f"{i}.png": photo(i) for i in range(4)})
    (folder / "5.png").write_bytes(b"")
    (folder / "6.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    found = survey(as_training_set(folder))
    assert list(found.unreadable) == [4, 5]
    assert found.groups == ()
    assert np.isnan(found.strangeness).tolist() == [False] * 4 + [True] * 2
    for file in folder.glob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(ProbeError, match="none of the 6 images can be read; the first: row 0 .*0.png"):
        survey(as_training_set(folder))


def test_what_is_drawn_is_always_the_same(monkeypatch):
    for name in ("survey.OTHERS", "survey.SAMPLE", "parts.SAMPLE"):
        monkeypatch.setattr(f"memwatch.picking.{name}", 20)
    pictures = [with_logo(photo(i)) for i in range(25)] + [photo(i) for i in range(20)]
    first = look(pictures)
    assert "shared parts were searched in 20 rows" in first.notes[-1]
    np.random.seed(7)
    assert same_survey(look(pictures), first)


def test_the_work_grows_as_the_rows_do(monkeypatch):
    for name in ("survey.OTHERS", "survey.SAMPLE", "parts.SAMPLE", "parts.MOVED_SAMPLE"):
        monkeypatch.setattr(f"memwatch.picking.{name}", 30)
    work = Counter()

    def count(name, number):
        function = operator.attrgetter(name)(picking)

        def call(*args):
            work[name] += number(*args)
            return function(*args)

        monkeypatch.setattr(f"memwatch.picking.{name}", call)

    count("same_place.checked", lambda a, *_: len(a))
    count("duplicates.bits_apart", lambda a, _: len(a))
    count("survey._squared_distances", lambda a, b: len(a) * len(b))
    pictures = [with_logo(photo(i)) if i % 3 == 0 else photo(i) for i in range(180)]
    look(pictures[:90])
    once = dict(work)
    work.clear()
    look(pictures)
    assert all(work[name] <= 3 * once[name] + 100 for name in work), (once, work)  # all against all is 4 times
    assert len(work) == 3


def test_of_a_shared_part_the_member_least_like_the_others_comes_first():
    thumbnails = np.zeros((5, 32, 32, 3), np.uint8)
    thumbnails[:, 16:] = 100
    thumbnails[2, 16:] = 250  # its rest differs
    thumbnails[4, :16, :16] = 250  # so does this one, but inside of its part
    best = best_members(thumbnails, dict.fromkeys(range(5), (0.0, 0.0, 0.5, 0.5)))
    assert best[0] == 2
    assert sorted(best) == list(range(5))


def test_case_and_spaces_of_captions_do_not_count():
    captions = ["A cat", "a  cat ", "a dog", "", "", "a CAT", "a dog", "a bird"]
    assert look([photo(i) for i in range(8)], captions).captions == ((0, 1, 5), (2, 6))


def test_rare_words_make_rare_captions(monkeypatch):
    captions = ["a red cat", "a red dog", "a red cat", "a blue cat", "a quokka", "a red horse"]
    # of 5 different captions: red in 3, cat in 2, dog, blue, quokka and horse in 1; "a" counts nothing
    rarity = {
        0: math.log(5 / 3) + math.log(5 / 2),
        1: math.log(5 / 3) + math.log(5),
        3: math.log(5 / 2) + math.log(5),
        4: math.log(5),
        5: math.log(5 / 3) + math.log(5),
    }
    mean = sum(rarity.values()) / 5
    expected = sorted((row for row in rarity if rarity[row] > mean), key=lambda row: (-rarity[row], row))
    assert module.rare_captions(captions) == expected == [3, 1, 5]
    monkeypatch.setattr(module, "RARE", 2)
    assert module.rare_captions(captions) == [3, 1]


@pytest.mark.parametrize("captions", [[], ["", ""], ["a cat"] * 5, ["a cat", "a dog"]])
def test_where_no_caption_is_rarer_than_another_none_is_rare(captions):
    assert module.rare_captions(captions) == []


def test_strangeness_is_the_distance_to_the_nearest_three():
    colours = [0, 10, 20, 30, 200]
    found = look([Image.new("RGB", (64, 64), (c, c, c)) for c in colours])
    expected = [np.mean(sorted(abs(c - d) for j, d in enumerate(colours) if j != i)[:3]) for i, c in enumerate(colours)]
    assert found.strangeness == pytest.approx(expected, abs=0.05)
    assert look([photo(0)]).strangeness.tolist() == [0.0]


def test_strangeness_is_exact_up_to_a_number_of_rows_and_near_it_above(monkeypatch):
    hashes = hashes_of([photo(i, 32) for i in range(BLOCK + 4)])
    exact = strangeness(hashes)
    small = coarse(hashes.thumbnails).astype(float)
    apart = np.sqrt(((small[:, None] - small) ** 2).mean(-1))
    assert exact == pytest.approx(np.sort(apart, axis=1)[:, 1:4].mean(1), rel=1e-3)
    monkeypatch.setattr(module, "OTHERS", 100)
    assert (strangeness(hashes) >= exact - 1e-3).all()  # there are fewer to be near
