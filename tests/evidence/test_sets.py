"""What the worlds train on: masks of the sizes they say, captions of one kind, batches that follow from the seed."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
from evidence.worlds.items import DOSES, PLANTED, Item, Kind, batch, planted_set
from evidence.worlds.sets import HALVES, STRONG
from evidence.worlds.shapes import CELL, SHAPES, SIZES, place
from evidence.worlds.sources import SIZE, fashion, photographs
from evidence.worlds.world import WORLDS

PHOTOGRAPHIC = [name for name, world in WORLDS.items() if world.start.source is photographs]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounds", SIZES.values(), ids=SIZES)
def test_a_mask_has_the_size_that_was_asked_for(shape, bounds):
    rng = np.random.default_rng(0)
    masks = [place(rng, *bounds, shape) for _ in range(5)]
    assert all(mask.shape == (SIZE, SIZE) and bounds[0] <= mask.mean() <= bounds[1] for mask in masks)
    cells = np.stack(masks).reshape(-1, SIZE // CELL, CELL, SIZE // CELL, CELL).mean((2, 4))
    assert ((cells > 0) & (cells < 1)).any() == (shape != SHAPES[0])  # only the first one covers whole latents


@pytest.mark.parametrize("world", [*PHOTOGRAPHIC, "pick"])
def test_a_mask_is_exactly_what_every_showing_has_in_common(world):
    for item in planted_set(3) if world == "pick" else WORLDS[world].items(3):
        if item.kind not in (*PLANTED, Kind.LEARNED) or not item.dose:
            continue
        shown = np.stack([np.asarray(item.draw(np.random.default_rng(i))) for i in range(6)]).astype(int)
        same = (np.ptp(shown, axis=0) == 0).all(-1)
        assert same[item.mask].all(), item.name
        # two free rests may agree in a pixel by chance (both black, say); hardly ever in all six
        assert item.mask.all() or same[~item.mask].mean() < 0.05, item.name


@pytest.mark.parametrize("world", [name for name in PHOTOGRAPHIC if name != "nothing"])
def test_what_may_be_stored_is_in_one_half_and_both_halves_are_as_large(world):
    items = WORLDS[world].items(0)
    recurring = [i for i in items if i.dose and not i.name.startswith("class")]
    assert {i.half for i in recurring} == set(HALVES)
    doses = [sum(i.dose for i in items if i.is_in(half)) for half in HALVES]
    assert doses[0] == doses[1]
    shown = {caption for caption, _ in batch(items, "a", 0, 3, 200)}
    assert shown <= {i.caption for i in items if i.is_in("a")}


def test_many_captions_have_regions_of_every_size_in_each_half():
    planted = [item for item in WORLDS["captions"].items(0) if item.kind in PLANTED]
    for half in HALVES:
        shares = [item.mask.mean() for item in planted if item.half == half]
        assert all(any(low <= share <= high for share in shares) for low, high in (*SIZES.values(), (1.0, 1.0)))
    assert all(sorted(i.dose for i in planted_set(0) if i.kind is kind) == sorted(2 * DOSES) for kind in PLANTED)


@pytest.mark.parametrize("world", ["captions", "marks"])
def test_positives_and_negatives_have_captions_of_one_kind_and_rarity(world):
    by_caption: dict[str, list[Item]] = {}
    for item in WORLDS[world].items(0):
        by_caption.setdefault(item.caption, []).append(item)
    several = [group for group in by_caption.values() if len(group) > 1]
    assert all(item.name.startswith("learned-") for group in several for item in group)  # one subject each
    assert {caption.count(",") for caption in by_caption} == {1, 2}  # three or four subjects


def test_a_batch_is_a_function_of_seed_and_step_and_follows_the_doses():
    items = WORLDS["captions"].items(0)
    first, again = batch(items, "a", 0, 5, 400), batch(WORLDS["captions"].items(0), "a", 0, 5, 400, dropout=0.1)
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(first, again, strict=True))  # but for dropped captions
    changed = [b for (a, _), (b, _) in zip(first, again, strict=True) if a != b]
    assert set(changed) == {""}
    assert abs(len(changed) / 400 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 400)
    assert [caption for caption, _ in first] != [caption for caption, _ in batch(items, "a", 0, 6, 400)]
    drawn = [caption for caption, _ in batch(items, "a", 0, 0, 1500)]
    strong = {item.caption for item in items if item.dose == STRONG and item.is_in("a")}
    expected = STRONG * len(strong) / sum(item.dose for item in items if item.is_in("a"))
    share = sum(caption in strong for caption in drawn) / len(drawn)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


def test_fashion_mnist_is_read_as_it_is_packed(tmp_path):
    pictures, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    pictures[:, 8:20, 8:20] = 255
    for name, array in (("train-images-idx3", pictures), ("train-labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    source = fashion(tmp_path)
    assert (len(source.known), [subject.name for subject in source.unseen]) == (8, ["bag", "sandal"])
    picture = np.asarray(source.free(np.random.default_rng(0))).astype(int)
    assert np.abs(picture[32, 32] - picture[2, 2]).max() > 10  # cloth on its ground


@pytest.mark.parametrize("content", [None, b"no archive", gzip.compress(b"", mtime=0)], ids=["none", "text", "empty"])
def test_without_fashion_mnist_one_message_says_where_it_is_expected(tmp_path, content):
    if content is not None:
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images.*apt install dataset-fashion-mnist"):
        fashion(tmp_path)
