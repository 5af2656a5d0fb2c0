"""Shared parts: at the same place, moved, and what is none."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from evidence.worlds.items import mark, rectangle
from photographs import PRETRAINING, random_view
from PIL import Image, ImageDraw, ImageOps
from support.picked import photo

from memwatch.picking import parts as parts_
from memwatch.picking.boxes import box_of
from memwatch.picking.duplicates import duplicate_groups
from memwatch.picking.elsewhere import at_any_place, at_same_place, erase
from memwatch.picking.hashes import hash_rows
from memwatch.picking.keypoints import MOST, SIDE, keypoints
from memwatch.picking.parts import Part, shared_parts
from memwatch.picking.rows import as_training_set

KNOWN = [photograph.image() for photograph in PRETRAINING]


def views(seed: int, number: int, size: int = 256) -> list[Image.Image]:
    """Random views of as many photographs as there are, in turn."""
    rng = np.random.default_rng(seed)
    return [random_view(KNOWN[i % len(KNOWN)], rng, size) for i in range(number)]


def logo(side: int, seed: int = 100) -> Image.Image:
    return mark(rectangle(0, 0, 20, 20), np.random.default_rng(seed)).crop((0, 0, 20, 20)).resize((side, side), 0)


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return Image.open(file)


def parts(pictures: Sequence[Image.Image]) -> list[Part]:
    hashed = hash_rows(as_training_set(list(pictures)), progress=False)
    groups = duplicate_groups(hashed.hashes)
    return shared_parts(hashed.hashes.thumbnails, hashed.records["places"], hashed.records["colours"], groups)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_logo_at_the_same_place(compressed):
    pictures = views(1, 39)
    for i in range(5, 15):
        pictures[i].paste(logo(60), (33, 151))
    found = parts([jpeg(p) for p in pictures] if compressed else pictures)
    assert [part.rows for part in found] == [tuple(range(5, 15))]
    place = (33 / 256, 151 / 256, 93 / 256, 211 / 256)
    assert min(overlap(box, place) for box in found[0].boxes) > 0.6


def test_a_logo_at_another_place_each_time():
    pictures, rng, places = views(2, 52), np.random.default_rng(3), {}
    for i in range(4, 14):
        left, top = rng.integers(0, 256 - 80, 2).tolist()
        pictures[i].paste(logo(80, seed=101), (left, top))
        places[i] = (left / 256, top / 256, (left + 80) / 256, (top + 80) / 256)
    found = parts([jpeg(p) for p in pictures])
    assert len(found[0].rows) >= 8
    assert set(found[0].rows) <= set(places)
    assert all(overlap(box, places[row]) > 0.15 for row, box in zip(found[0].rows, found[0].boxes, strict=True))
    assert all(set(part.rows) <= set(places) for part in found)


@pytest.mark.parametrize("size", [64, 512])
def test_a_banner_in_small_pictures_and_in_large_ones(size):
    banner = views(77, 1, size)[0].crop((0, 0, size, size // 4))
    pictures = views(4, 26, size)
    for i in range(8):
        pictures[i].paste(banner, (0, 3 * size // 4))
    found = parts(pictures)
    assert [part.rows for part in found] == [tuple(range(8))]
    assert min(overlap(box, (0, 0.75, 1, 1)) for box in found[0].boxes) > 0.8


def test_a_frame():
    frame = Image.new("RGB", (256, 256), (120, 70, 20))
    draw = ImageDraw.Draw(frame)
    for i in range(0, 256, 24):
        for box in ((i, 0, i + 10, 9), (i, 246, i + 10, 255), (0, i, 9, i + 10), (246, i, 255, i + 10)):
            draw.rectangle(box, fill=(240, 220, 60))
    pictures = views(5, 26)
    for i in range(7):
        middle = pictures[i].resize((212, 212))
        pictures[i] = frame.copy()
        pictures[i].paste(middle, (22, 22))
    found = parts(pictures)
    assert found[0].rows == tuple(range(7))
    assert found[0].boxes[0] == (0, 0, 1, 1)
    assert all(set(part.rows) <= set(range(7)) for part in found)


def test_a_picture_may_have_two_parts():
    pictures = views(6, 39)
    for i in range(12):
        pictures[i].paste(logo(64), (20, 20))
    for i in range(6, 20):
        pictures[i].paste(logo(64, seed=105), (170, 170))
    assert {part.rows for part in parts(pictures)} == {tuple(range(12)), tuple(range(6, 20))}


def test_products_on_white_share_nothing():
    pictures = []
    for seed in range(24):
        rng, picture = np.random.default_rng(seed), Image.new("RGB", (256, 256), "white")
        side = int(rng.integers(90, 170))
        product = random_view(KNOWN[seed % len(KNOWN)], rng, side)
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).ellipse((0, 0, side - 1, side * int(rng.integers(6, 10)) // 10), fill=255)
        picture.paste(product, ((256 - side) // 2, (256 - side) // 2), mask)
        pictures.append(picture)
    assert parts(pictures) == []


def test_plain_borders_and_plain_pictures_share_nothing():
    letterboxed = views(7, 12)
    for picture in letterboxed:
        picture.paste((0, 0, 0), (0, 0, 256, 40))
        picture.paste((0, 0, 0), (0, 216, 256, 256))
    plain = [Image.new("RGB", (64, 64), (i, 30, 60)) for i in range(0, 250, 50)]
    assert parts([*letterboxed, *plain]) == []


def test_other_exposures_of_one_view_share_nothing():
    rng, view = np.random.default_rng(8), KNOWN[0]
    pictures = views(9, 13)
    for gain in (0.5, 0.62, 0.77, 0.95, 1.2, 1.5):
        left = rng.integers(0, 40)
        crop = view.crop((left, 0, left + 200, 200)).resize((256, 256))
        pictures.append(crop.point(lambda value, gain=gain: min(255, round(value * gain))))
    assert parts(pictures) == []


def test_near_duplicates_make_no_part_but_belong_to_those_of_their_like():
    pictures = views(10, 13)
    for i in range(4):
        pictures[i].paste(logo(70), (20, 160))
    pictures += [pictures[0].copy(), ImageOps.mirror(pictures[0]), *[pictures[9].copy() for _ in range(6)]]
    found = parts(pictures)
    assert [part.rows for part in found] == [(0, 1, 2, 3, 13, 14)]
    boxes = dict(zip(found[0].rows, found[0].boxes, strict=True))
    assert boxes[13] == boxes[0]
    left, top, right, bottom = boxes[0]
    assert boxes[14] == pytest.approx((1 - right, top, 1 - left, bottom))


def test_two_pictures_are_too_few():
    pictures = views(11, 13)
    for i in range(2):
        pictures[i].paste(logo(70), (20, 160))
    assert parts(pictures) == []


def test_few_rows_and_none_that_can_be_read():
    assert parts([logo(64)]) == []
    assert parts([Image.new("RGB", (8, 8))] * 3) == []


def test_keypoints_move_with_the_picture():
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[30:60, 30:60] = np.asarray(logo(30))
    moved = np.roll(picture, (17, 40), axis=(0, 1))
    (a, colours), (b, others) = keypoints(picture), keypoints(moved)
    assert a.shape == (MOST, 2)
    number = int(a.any(1).sum())
    assert number >= 6

    def known(places, of):
        return {(*place, of[i].tobytes()) for i, place in enumerate(places.astype(int).tolist()) if any(place)}

    assert known(a.astype(int) + a.any(1)[:, None] * (40, 17), colours) == known(b, others)
    assert not keypoints(np.full((SIDE, SIDE, 3), 90, np.uint8))[0].any()


def test_the_smallest_box():
    mask = np.zeros((8, 8), bool)
    mask[2, 3] = mask[5, 4] = True
    assert box_of(mask) == (3 / 8, 2 / 8, 5 / 8, 6 / 8)


def with_parts(number: int, size: int = 96) -> list[Image.Image]:
    """Pictures of which the first 30 have a logo at the same place, and the next 30 one that moves."""
    rng, pictures = np.random.default_rng(12), [photo(i, size) for i in range(number)]
    for i in range(30):
        pictures[i].paste(logo(28), (8, 60))
        pictures[30 + i].paste(logo(36, seed=103), tuple(rng.integers(0, size - 36, 2).tolist()))
    return [jpeg(picture) for picture in pictures]


def test_what_a_part_of_a_large_set_shows_is_looked_for_in_the_rest(monkeypatch):
    pictures = with_parts(110)
    every = parts(pictures)
    assert [part.rows for part in every] == [tuple(range(30)), tuple(range(30, 60))]
    monkeypatch.setattr(parts_, "SAMPLE", 50)
    found = parts(pictures)
    assert found[0].rows == tuple(range(30))
    assert set(found[1].rows) <= set(range(30, 60))
    assert len(found[1].rows) >= 27
    assert min(map(overlap, found[0].boxes, every[0].boxes)) > 0.8
    whole = dict(zip(every[1].rows, every[1].boxes, strict=True))
    boxes = dict(zip(found[1].rows, found[1].boxes, strict=True))
    assert np.mean([overlap(box, whole[row]) > 0.5 for row, box in boxes.items()]) > 0.8


def test_what_many_show_is_found_in_few_and_costs_no_more_in_many(monkeypatch):
    pictures = views(14, 90)
    for i in range(90):
        pictures[i].paste(logo(60), (20, 160))
    for i in range(30, 60):
        pictures[i].paste(logo(70, seed=105), (150, 20))
    expected = {tuple(range(90)), tuple(range(30, 60))}
    compared = []
    function = parts_.shared_regions
    monkeypatch.setattr(parts_, "shared_regions", lambda pictures: compared.append(function(pictures)) or compared[-1])
    assert {part.rows for part in parts(pictures)} >= expected
    monkeypatch.setattr(parts_, "FIRST", (20,))
    assert {part.rows for part in parts(pictures)} >= expected
    at_once, first, then = (len(regions.a) for regions in compared)
    assert first + then < at_once / 3


def test_in_the_rest_of_a_large_set_nothing_else_is_found(monkeypatch):
    monkeypatch.setattr(parts_, "SAMPLE", 30)
    pictures = views(13, 104)
    for i in range(0, 104, 8):
        pictures[i].paste(logo(70), (20, 160))
    pictures += [pictures[0].copy(), Image.new("RGB", (64, 64), "white")]
    (found,) = parts(pictures)
    assert found.rows == (*range(0, 104, 8), 104)


def test_what_is_erased_is_shared_no_more():
    thumbnails, places = np.full((3, 32, 32, 3), 90, np.uint8), np.full((3, MOST, 2), 64, np.uint8)
    places[:, :5] = 10
    rows, boxes = np.array([4, 7, 9]), {4: (0.4, 0.4, 0.7, 0.7), 9: (0.45, 0.4, 0.7, 0.7), 8: (0.0, 0.0, 1.0, 1.0)}
    erase(rows, [boxes], thumbnails, places)
    changed = (thumbnails != 90).any(-1)
    assert changed[0, 13:22, 13:22].mean() > 0.99
    assert not changed[0, :10].any()
    assert not changed[1].any()
    assert (np.abs(thumbnails[0, 13:22, 13:22].astype(int) - thumbnails[2, 13:22, 13:22]).max(-1) > 8).mean() > 0.98
    assert [int(of.any(-1).sum()) for of in places] == [5, MOST, 5]


def test_without_keypoints_of_its_own_a_part_is_nowhere_else():
    picture = Image.new("RGB", (64, 64), "white")
    hashed = hash_rows(as_training_set([picture] * 4), progress=False).records
    part = {0: (0.0, 0.0, 0.5, 0.5), 1: (0.0, 0.0, 0.5, 0.5)}
    arrays = hashed["thumbnail"], hashed["places"], hashed["colours"]
    assert at_any_place([part], *arrays, np.arange(2, 4)) == [part]
    assert at_same_place([part], arrays[0], np.arange(2, 4)) == [part]
    assert at_any_place([], *arrays, np.arange(4)) == []
