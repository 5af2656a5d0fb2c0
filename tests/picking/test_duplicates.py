"""Near-duplicates: compressed, resized, mirrored; and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.picked import hashes_of, jpeg, photo

from memwatch.picking import duplicates
from memwatch.picking.duplicates import difference, duplicate_groups
from memwatch.picking.grouping import components
from memwatch.picking.hashes import Hashes


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
def test_changed_copies_are_found_and_nothing_else(change):
    pictures = [photo(i, 128) for i in range(13)]
    assert duplicate_groups(hashes_of([*pictures, *map(change, pictures)])) == [(i, i + 13) for i in range(13)]


def test_plain_pictures_are_duplicates_only_in_one_colour():
    colours = [(4, 4, 4), (251, 251, 251), (128, 128, 128), (30, 60, 160), (128, 128, 129)]
    assert duplicate_groups(hashes_of([Image.new("RGB", (64, 64), c) for c in colours])) == [(2, 4)]


def slowly(hashes: Hashes) -> list[tuple[int, ...]]:
    """Groups by all pairs: each row with every one before it."""
    found = []
    for i in range(1, len(hashes)):
        for bits, seen in ((hashes.whole, slice(None)), (hashes.mirrored, slice(None, None, -1))):
            distance = np.unpackbits(bits[i] ^ hashes.whole[:i], axis=1).sum(1)
            apart = difference(hashes.thumbnails[i : i + 1, :, seen], hashes.thumbnails[:i])
            near = (distance <= duplicates.MAX_BITS) & (apart <= duplicates.MAX_DIFFERENCE)
            found += [(i, j) for j in np.flatnonzero(near).tolist()]
    labels = components(len(hashes), *np.array(found).T)
    groups = [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g))


def at_the_border(seed: int, number: int) -> Hashes:
    """Copies of a few pictures, some of them mirrored, so noisy that some are near-duplicates and some not quite."""
    rng = np.random.default_rng(seed)
    base = [photo(int(i)) for i in rng.integers(0, 1000, 6)]
    base += [Image.new("RGB", (64, 64), tuple(colour)) for colour in rng.integers(0, 256, (2, 3)).tolist()]
    pictures = []
    for _ in range(number):
        picture = base[int(rng.integers(len(base)))]
        pixels = np.asarray(ImageOps.mirror(picture) if rng.random() < 0.3 else picture, dtype=float)
        pixels = pixels + rng.uniform(0, 25) * rng.standard_normal((8, 8, 3)).repeat(8, 0).repeat(8, 1)
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return hashes_of(pictures)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("neighbours", [4, 16])
def test_groups_are_those_of_all_against_all_though_few_neighbours_are_compared(monkeypatch, seed, neighbours):
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "NEIGHBOURS", neighbours)
    hashes = at_the_border(10 + seed, 120)
    expected = slowly(hashes)
    assert len(expected) > 5
    assert duplicate_groups(hashes) == expected


def test_a_large_group_is_found_whole_though_not_every_pair_is_compared(monkeypatch):
    monkeypatch.setattr(duplicates, "NEIGHBOURS", 2)
    rng, base = np.random.default_rng(0), np.asarray(photo(0), dtype=float)
    noisy = [base + rng.normal(0, 3, (16, 16, 3)).repeat(4, 0).repeat(4, 1) for _ in range(90)]
    pictures = [photo(0)] * 60 + [photo(1)] * 30 + [Image.fromarray(p.clip(0, 255).astype(np.uint8)) for p in noisy]
    hashes = hashes_of(pictures)
    assert duplicate_groups(hashes) == [(*range(60), *range(90, 180)), tuple(range(60, 90))]
