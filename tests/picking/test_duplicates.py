"""Near-duplicates: compressed, resized, mirrored; and what only looks like it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from support.picked import photo

from memwatch.bench.photographs import PRETRAINING, random_view
from memwatch.picking import duplicates
from memwatch.picking.duplicates import difference, duplicate_groups, near_pairs
from memwatch.picking.hashes import Hashes, hashes_of


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.fixture(scope="module")
def views() -> list[Image.Image]:
    """Random views of different photographs."""
    rng = np.random.default_rng(100)
    return [random_view(photograph.image(), rng, 128) for photograph in PRETRAINING]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p,
        lambda p: jpeg(p, 30),
        lambda p: p.resize((64, 64)),
        lambda p: p.resize((300, 300)),
        ImageOps.mirror,
        lambda p: jpeg(ImageOps.mirror(p).resize((100, 100)), 60),
    ],
    ids=["same", "compressed", "smaller", "larger", "mirrored", "all of it"],
)
def test_changed_copies_are_found_and_nothing_else(views, change):
    groups = duplicate_groups(hashes_of([*views, *map(change, views)]))
    assert groups == [(i, i + len(views)) for i in range(len(views))]


def test_wide_pictures_are_compared_on_the_square_that_training_sees():
    narrow = photo(1, side=128)
    wide = Image.new("RGB", (256, 128))
    wide.paste(narrow, (64, 0))
    assert duplicate_groups(hashes_of([photo(2), narrow, wide])) == [(1, 2)]


def test_plain_pictures_are_duplicates_only_in_one_colour():
    colours = [(4, 4, 4), (251, 251, 251), (128, 128, 128), (30, 60, 160), (128, 128, 129)]
    assert duplicate_groups(hashes_of([Image.new("RGB", (64, 64), c) for c in colours])) == [(2, 4)]


def test_other_products_on_white_are_no_duplicates():
    pictures = []
    for i in range(6):
        picture = Image.new("RGB", (128, 128), "white")
        colour, size = tuple(np.random.default_rng(i).integers(0, 200, 3).tolist()), 20 + 4 * i
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if i % 2 else draw.rectangle)((64 - size, 64 - size // 2, 64 + size, 64 + size), fill=colour)
        pictures.append(picture)
    assert duplicate_groups(hashes_of(pictures)) == []


def slowly(hashes: Hashes) -> set[tuple[int, int]]:
    """All pairs, one by one."""
    found = set()
    for i in range(len(hashes)):
        for j in range(i):
            for bits, seen in ((hashes.whole, slice(None)), (hashes.mirrored, slice(None, None, -1))):
                distance = int(np.unpackbits(bits[i] ^ hashes.whole[j]).sum())
                apart = difference(hashes.thumbnails[i][None, :, seen], hashes.thumbnails[j][None])[0]
                if distance <= duplicates.MAX_BITS and apart <= duplicates.MAX_DIFFERENCE:
                    found.add((i, j))
    return found


def test_pairs_are_those_of_all_against_all(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    rng = np.random.default_rng(5)
    base = [photo(i) for i in range(10)]
    pictures = []
    for _ in range(40):  # noisy copies at the border of what counts
        pixels = np.asarray(base[int(rng.integers(10))], dtype=float)
        pixels = pixels + rng.uniform(0, 25) * rng.standard_normal((8, 8, 3)).repeat(8, 0).repeat(8, 1)
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    hashes = hashes_of(pictures)
    a, b = near_pairs(hashes, hashes)
    expected = slowly(hashes)
    assert 10 < len(expected) < 100
    assert set(zip(a.tolist(), b.tolist(), strict=True)) == expected


def test_a_large_group_hangs_together_though_not_every_pair_is_looked_at(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 16)
    monkeypatch.setattr(duplicates, "PARTNERS", 2)
    hashes = hashes_of([photo(0)] * 60 + [photo(1)] * 30)
    assert duplicate_groups(hashes) == [tuple(range(60)), tuple(range(60, 90))]
    assert len(near_pairs(hashes, hashes)[0]) <= 2 * 4 * 90  # plain and mirrored


def test_rows_that_cannot_be_read_are_nobody_s_duplicates():
    hashes = hashes_of([Image.new("RGB", (8, 8))] * 3)
    unread = Hashes(hashes.whole, hashes.mirrored, hashes.thumbnails, np.array([True, False, False]))
    assert duplicate_groups(unread) == []
