"""Hashes: the perceptual hash against a second implementation, and a pass over all rows."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image, ImageOps
from support.picked import photo, save_folder

from memwatch.picking import workers
from memwatch.picking.hashes import CELLS, hash_rows, hashes_of, record_of
from memwatch.picking.keypoints import SIDE
from memwatch.picking.pictures import decoded, square
from memwatch.picking.rows import as_training_set


def by_hand(picture: Image.Image) -> np.ndarray:
    """The 64 bits: which of the 64 lowest frequencies of the 32 px grey picture lie above their median."""
    grey = np.asarray(square(picture, SIDE).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    lowest = scipy.fft.dctn(grey, type=2)[:8, :8]
    return (lowest > np.median(lowest)).ravel()


def test_the_hash_is_that_of_a_second_implementation():
    for seed in range(12):
        picture = photo(seed, side=96)
        record = record_of(picture)
        assert np.array_equal(np.unpackbits(record["whole"]).astype(bool), by_hand(picture))
        assert np.array_equal(np.unpackbits(record["mirrored"]).astype(bool), by_hand(ImageOps.mirror(picture)))


def test_the_thumbnail_is_the_middle_square():
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (110, 0, 190, 100))
    thumbnail = record_of(wide)["thumbnail"].astype(int)
    assert np.abs(thumbnail[:, 5:-5] - (0, 0, 255)).max() <= 1
    assert np.abs(thumbnail[:, :2] - (255, 0, 0)).max() <= 1
    checks = np.kron(np.indices((CELLS, CELLS)).sum(0) % 2, np.ones((4, 4)))[..., None] * np.ones(3) * 200
    exact = record_of(Image.fromarray(checks.astype(np.uint8)))["thumbnail"]
    assert np.array_equal(exact, checks[::4, ::4])


def test_a_jpeg_that_is_decoded_smaller_gives_the_same_hash(tmp_path):
    picture = photo(3, side=1024)
    picture.save(tmp_path / "a.jpg", quality=90)
    small = decoded(tmp_path / "a.jpg", 2 * SIDE)
    assert small.size == (256, 256)
    a, b = record_of(small), record_of(decoded(tmp_path / "a.jpg"))
    assert np.unpackbits(a["whole"] ^ b["whole"]).sum() <= 2
    assert np.abs(a["thumbnail"].astype(int) - b["thumbnail"]).mean() < 1


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "train", {f"{i}.{'png' if i % 2 else 'jpg'}": photo(i) for i in range(6)})


def test_two_processes_equal_one(folder):
    (folder / "broken.png").write_bytes(b"no picture")
    rows = as_training_set(folder)
    one, two = (hash_rows(rows, workers=number, progress=False) for number in (1, 2))
    assert np.array_equal(one.records, two.records)
    assert one.unreadable == two.unreadable
    assert list(one.unreadable) == [6]
    assert "broken.png" in one.unreadable[6]
    assert one.hashes.readable.tolist() == [True] * 6 + [False]


def test_when_workers_are_lost_the_images_are_hashed_all_the_same(folder, monkeypatch, caplog):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with caplog.at_level(logging.WARNING, "memwatch"):
        found = hash_rows(as_training_set(folder), workers=2, progress=False)
    assert np.array_equal(found.records, hash_rows(as_training_set(folder), progress=False).records)
    assert "hashed in this process instead" in caplog.text


def test_rows_that_fail_are_counted_with_their_reasons():
    source = [(photo(0), "a"), ({}, "b"), ("/nowhere/c.png", "c"), (np.full((4, 4, 3), np.nan), "d"), (photo(1), "e")]
    found = hash_rows(as_training_set(source), progress=False)
    assert list(found.unreadable) == [1, 2, 3]
    assert "a dict is no image" in found.unreadable[1]
    assert "/nowhere/c.png" in found.unreadable[2]
    assert "not finite" in found.unreadable[3]
    assert found.hashes.readable.tolist() == [True, False, False, False, True]


def test_hashes_of_other_pictures():
    found = hashes_of([photo(0), photo(1)])
    assert found.readable.all()
    assert np.array_equal(found.whole[1], record_of(photo(1))["whole"])
    assert len(hashes_of([])) == 0


def test_pictures_in_memory_cross_to_workers_whatever_they_are():
    source = [photo(0), np.asarray(photo(1)), torch.from_numpy(np.asarray(photo(2)).copy()), {"no": "picture"}]
    rows = as_training_set([(picture, "") for picture in source])
    one, two = (hash_rows(rows, workers=number, progress=False) for number in (1, 2))
    assert np.array_equal(one.records, two.records)
    assert one.unreadable == two.unreadable
    assert list(one.unreadable) == [3]
    assert "a dict is no image" in one.unreadable[3]
