"""Shared parts: at the same place, moved, and what is none."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from support.picked import jpeg, logo, photo, save_folder, with_logo

from memwatch.picking import parts as module
from memwatch.picking.duplicates import duplicate_groups
from memwatch.picking.hashes import hash_rows
from memwatch.picking.parts import shared_parts
from memwatch.picking.rows import as_training_set
from memwatch.picking.same_place import Part
from memwatch.picking.survey import survey


def photos(seed: int, number: int, side: int = 256) -> list[Image.Image]:
    return [photo(1000 * seed + i, side) for i in range(number)]


def parts(pictures: Sequence[Image.Image]) -> list[Part]:
    rows = as_training_set(list(pictures))
    hashes = hash_rows(rows)
    return shared_parts(hashes.thumbnails, rows, duplicate_groups(hashes))


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.fixture
def fixed_only(monkeypatch):
    monkeypatch.setattr(module, "has_opencv", lambda: False)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_logo_at_the_same_place(compressed):
    pictures = photos(1, 39)
    pictures[5:15] = [with_logo(p, 33, 151, 60) for p in pictures[5:15]]
    (found,) = parts([jpeg(p) for p in pictures] if compressed else pictures)
    assert tuple(found) == tuple(range(5, 15))
    place = (33 / 256, 151 / 256, 93 / 256, 211 / 256)
    assert min(overlap(box, place) for box in found.values()) > 0.6


@pytest.mark.parametrize("size", [64, 512])
def test_a_banner_in_small_pictures_and_in_large_ones(size, fixed_only):
    banner = with_logo(photo(77, size), 0, 0, size // 4).crop((0, 0, size, size // 4))
    pictures = photos(4, 26, size)
    for picture in pictures[:8]:
        picture.paste(banner, (0, 3 * size // 4))
    (found,) = parts(pictures)
    assert tuple(found) == tuple(range(8))
    assert min(overlap(box, (0, 0.75, 1, 1)) for box in found.values()) > 0.8


def test_a_frame(fixed_only):
    frame, pictures = Image.new("RGB", (256, 256), (120, 70, 20)), photos(5, 26)
    draw = ImageDraw.Draw(frame)
    for i in range(0, 256, 24):
        for box in ((i, 0, i + 10, 9), (i, 246, i + 10, 255), (0, i, 9, i + 10), (246, i, 255, i + 10)):
            draw.rectangle(box, fill=(240, 220, 60))
    for picture in pictures[:7]:
        middle = picture.resize((212, 212))
        picture.paste(frame)
        picture.paste(middle, (22, 22))
    found = parts(pictures)
    assert tuple(found[0]) == tuple(range(7))
    assert found[0][0] == (0, 0, 1, 1)


def test_a_picture_may_have_two_parts():
    pictures = photos(6, 39)
    pictures[:12] = [with_logo(p, 20, 20, 64) for p in pictures[:12]]
    pictures[6:20] = [with_logo(p, 170, 170, 64, seed=105) for p in pictures[6:20]]
    assert set(map(tuple, parts(pictures))) == {tuple(range(12)), tuple(range(6, 20))}


def letterboxed_and_plain() -> list[Image.Image]:
    letterboxed = photos(7, 12)
    for picture in letterboxed:
        picture.paste((0, 0, 0), (0, 0, 256, 40))
        picture.paste((0, 0, 0), (0, 216, 256, 256))
    return letterboxed + [Image.new("RGB", (64, 64), (i, 30, 60)) for i in range(0, 250, 50)]


def other_exposures_of_one_view() -> list[Image.Image]:
    rng, pictures, view = np.random.default_rng(8), photos(9, 13), with_logo(photo(8), 10, 10, 40).resize((256, 256))
    for gain in (0.5, 0.62, 0.77, 0.95, 1.2, 1.5):
        left = rng.integers(0, 40)
        crop = view.crop((left, 0, left + 200, 200)).resize((256, 256))
        pictures.append(crop.point(lambda value, gain=gain: min(255, round(value * gain))))
    return pictures


def two_with_a_logo() -> list[Image.Image]:
    return [with_logo(p, 20, 160, 70) for p in photos(11, 2)] + photos(12, 11)


@pytest.mark.parametrize(
    "pictures",
    [
        letterboxed_and_plain,
        other_exposures_of_one_view,
        two_with_a_logo,
        lambda: [logo(64)],
        lambda: [Image.new("RGB", (8, 8))] * 3,
    ],
)
def test_what_shares_no_part(pictures):
    assert parts(pictures()) == []


def test_near_duplicates_make_no_part_but_belong_to_those_of_their_like():
    pictures = photos(10, 13)
    pictures[:4] = [with_logo(p, 20, 160, 70) for p in pictures[:4]]
    pictures += [pictures[0].copy(), ImageOps.mirror(pictures[0]), *[pictures[9].copy() for _ in range(6)]]
    (found,) = parts(pictures)
    assert tuple(found) == (0, 1, 2, 3, 13, 14)
    assert found[13] == found[0]
    left, top, right, bottom = found[0]
    assert found[14] == pytest.approx((1 - right, top, 1 - left, bottom))


def test_in_a_large_set_parts_are_searched_in_some_rows_and_looked_for_in_the_rest(monkeypatch, fixed_only):
    pictures = photos(13, 105, 96)
    pictures[::7] = [with_logo(p, 8, 60, 28) for p in pictures[::7]]
    pictures += [pictures[0].copy(), Image.new("RGB", (64, 64), "white")]
    (every,) = parts(pictures)
    monkeypatch.setattr(module, "SAMPLE", 40)
    (found,) = parts(pictures)
    assert tuple(found) == tuple(every) == (*range(0, 105, 7), 105)
    assert min(overlap(found[row], every[row]) for row in found) > 0.8


def test_what_many_show_is_found_in_few_and_costs_no_more_in_many(monkeypatch, fixed_only):
    pictures = [with_logo(p, 20, 160, 60) for p in photos(14, 90)]
    pictures[30:60] = [with_logo(p, 150, 20, 70, seed=105) for p in pictures[30:60]]
    expected, compared, real = {tuple(range(90)), tuple(range(30, 60))}, [], module.shared_regions
    monkeypatch.setattr(module, "shared_regions", lambda pictures: compared.append(real(pictures)) or compared[-1])
    assert set(map(tuple, parts(pictures))) >= expected
    monkeypatch.setattr(module, "FIRST", (20,))
    assert set(map(tuple, parts(pictures))) >= expected
    at_once, first, then = (len(regions[0]) for regions in compared)
    assert first + then < at_once / 3


def moved(number: int, members: range, mark: Image.Image) -> tuple[list[Image.Image], Part]:
    """Pictures of which some show a mark, each at another place, and these places."""
    pictures, rng, places = photos(2, number), np.random.default_rng(3), {}
    for row in members:
        left, top = rng.integers(0, 256 - mark.width, 2).tolist()
        pictures[row].paste(mark, (left, top))
        places[row] = (left / 256, top / 256, (left + mark.width) / 256, (top + mark.width) / 256)
    return [jpeg(picture) for picture in pictures], places


@pytest.mark.parametrize("mark", [logo(80), photo(99, 128).crop((20, 20, 90, 90))], ids=["flat", "photograph"])
@pytest.mark.parametrize("sample", [1024, 24])
def test_a_mark_at_another_place_each_time(mark, sample, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr(module, "MOVED_SAMPLE", sample)
    pictures, places = moved(52, range(4, 24), mark)
    found = parts(pictures)
    assert len(found[0]) >= 17
    assert all(set(part) <= set(places) for part in found)
    assert np.mean([overlap(box, places[row]) for row, box in found[0].items()]) > 0.6


def test_what_moves_adds_the_rows_where_it_lies_elsewhere():
    pytest.importorskip("cv2")
    pictures, _ = moved(40, range(10), logo(80))
    pictures[10:20] = [jpeg(with_logo(p, 30, 150, 80)) for p in photos(3, 10)]
    first = parts(pictures)[0]
    assert set(first) >= set(range(10, 20))
    assert len(first) >= 17


def test_rows_that_are_gone_when_they_are_read_again_are_passed_over(tmp_path):
    pytest.importorskip("cv2")
    pictures, _ = moved(30, range(10), logo(80))
    rows = as_training_set(save_folder(tmp_path / "train", {f"{i:02d}.png": p for i, p in enumerate(pictures)}))
    hashes = hash_rows(rows)
    rows.file(3).unlink()
    (found,) = shared_parts(hashes.thumbnails, rows, [])
    assert 3 not in found
    shutil.rmtree(tmp_path / "train")
    assert shared_parts(hashes.thumbnails, rows, []) == []


def test_without_opencv_only_parts_at_the_same_place_are_found(fixed_only, monkeypatch):
    monkeypatch.setattr("memwatch.picking.survey.has_opencv", lambda: False)
    pictures, _ = moved(40, range(20), logo(80))
    found = survey(as_training_set(pictures))
    assert found.groups == ()
    assert "parts were not searched at other places than the same" in found.notes[0]
