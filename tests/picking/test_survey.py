"""The survey as a whole: groups in order, captions, strangeness, a digest, and pictures known again."""

from __future__ import annotations

import logging
import multiprocessing

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.picked import photo, save_folder, with_logo

from memwatch.measure.probes import ProbeError
from memwatch.picking.hashes import hashes_of
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import BLOCK, GroupKind, matches, strangeness, survey


def look(pictures, captions=None, **settings):
    texts = captions or [f"picture {i}" for i in range(len(pictures))]
    return survey(as_training_set(list(zip(pictures, texts, strict=True))), progress=False, **settings)


def test_groups_come_largest_first():
    pictures = [photo(i) for i in range(12)]
    pictures += [with_logo(photo(20 + i)) for i in range(5)] + [photo(0)] * 4 + [photo(1)]
    found = look(pictures)
    assert found.size == len(found.hashes) == 22
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


def test_the_digest_changes_with_pictures_captions_and_rows():
    pictures, texts = [photo(i) for i in range(4)], list("abcd")
    digest = look(pictures, texts).digest
    assert look(pictures, texts).digest == digest
    others = [
        look(pictures[::-1], texts),
        look(pictures, [*texts[:3], "e"]),
        look(pictures[:3], texts[:3]),
        look([*pictures[:3], photo(9)], texts),
    ]
    assert len({digest, *(other.digest for other in others)}) == 5


def test_what_was_found_is_kept_on_disk(tmp_path, monkeypatch):
    pictures = {f"{i}.png": with_logo(photo(i)) for i in range(4)} | {"copy.png": with_logo(photo(0))}
    rows = as_training_set(save_folder(tmp_path / "train", pictures))
    first = survey(rows, cache=tmp_path / "cache", progress=False)
    assert len(first.groups) == 2
    with monkeypatch.context() as patch:
        patch.setattr("memwatch.picking.survey.groups_of", None)  # whoever calls it fails
        again = survey(rows, cache=tmp_path / "cache", progress=False)
    assert again.groups == first.groups
    assert again.digest == first.digest
    assert again.strangeness.tolist() == first.strangeness.tolist()
    photo(9).save(tmp_path / "train" / "copy.png")
    changed = survey(as_training_set(tmp_path / "train"), cache=tmp_path / "cache", progress=False)
    assert [len(group.rows) for group in changed.groups] == [4]


def test_kept_groups_that_cannot_be_read_are_looked_for_anew(tmp_path, caplog):
    rows = as_training_set(save_folder(tmp_path / "train", {f"{i}.png": photo(0) for i in range(2)}))
    first = survey(rows, cache=tmp_path / "cache", progress=False)
    (tmp_path / "cache" / "groups.json").write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "memwatch"):
        assert survey(rows, cache=tmp_path / "cache", progress=False).groups == first.groups
    assert "looked for anew" in caplog.text


def test_strangeness_is_the_distance_to_the_nearest_three():
    colours = [0, 10, 20, 30, 200]
    found = look([Image.new("RGB", (64, 64), (c, c, c)) for c in colours])
    expected = [np.mean(sorted(abs(c - d) for j, d in enumerate(colours) if j != i)[:3]) for i, c in enumerate(colours)]
    assert found.strangeness == pytest.approx(expected, abs=0.05)


def test_strangeness_of_more_rows_than_a_block_and_of_one():
    rng = np.random.default_rng(0)
    hashes = hashes_of([Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(3)])
    numbers = rng.permutation(np.arange(BLOCK + 40) % 3)
    many = type(hashes)(*(field[numbers] for field in vars(hashes).values()))
    assert strangeness(many).max() < 0.05  # each has three others that are the same
    assert look([photo(0)]).strangeness.tolist() == [0.0]


def test_given_pictures_are_known_again():
    found = look([photo(i) for i in range(8)] + [photo(3)])
    given = [photo(20), photo(3).resize((50, 50)), ImageOps.mirror(photo(5)), Image.new("RGB", (64, 64)), photo(0)]
    assert matches(given, found) == [None, 3, 5, None, 0]
    assert matches([], found) == []


def test_small_sets_start_no_process(monkeypatch):
    monkeypatch.setattr("memwatch.picking.hashes.in_workers", None)
    assert look([photo(i) for i in range(3)]).size == 3
    assert not multiprocessing.active_children()
