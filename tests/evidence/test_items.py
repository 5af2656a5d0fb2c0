"""What the first planted set holds: masks, doses, and batches that follow from seed and step alone."""

import math

import numpy as np
from evidence.worlds.items import DOSES, PLANTED, Kind, batch, planted_set


def test_the_mask_is_exactly_what_stays_the_same():
    for item in planted_set(3):
        if item.kind not in PLANTED:
            assert not item.mask.any()
            continue
        shown = np.stack([np.asarray(item.draw(np.random.default_rng(i))) for i in range(6)]).astype(int)
        same = (np.ptp(shown, axis=0) == 0).all(-1)
        assert same[item.mask].all(), item.name
        # two free rests may agree in a pixel by chance (both black, say); hardly ever in all six
        assert same[~item.mask].mean() < 0.02 if not item.mask.all() else True, item.name


def test_doses_and_sizes():
    items = planted_set(0)
    for kind in PLANTED:
        assert sorted(item.dose for item in items if item.kind is kind) == sorted(2 * DOSES)
    shares = {kind: [item.mask.mean() for item in items if item.kind is kind] for kind in PLANTED}
    assert min(shares[Kind.TEMPLATE]) > 0.1
    assert max(shares[Kind.TEMPLATE]) <= 0.5
    logos = [item.mask.mean() for seed in range(20) for item in planted_set(seed) if item.kind is Kind.LOGO]
    assert 0.04 <= min(logos) < 0.05
    assert 0.10 < max(logos) <= 0.12
    assert set(shares[Kind.VERBATIM]) == {1.0}
    assert all(item.dose == 0 for item in items if item.kind is Kind.HELD_OUT)
    learned = {item.caption for item in items if item.kind is Kind.LEARNED}
    controls = {item.caption for item in items if item.kind is Kind.CONTROL and item.dose}
    assert learned == controls  # controls have the new subjects too
    captions = [item.caption for item in items if item.kind in PLANTED]
    assert len(set(captions)) == len(captions)


def test_a_batch_is_a_function_of_seed_and_step_and_follows_the_doses():
    items = planted_set(0)
    first, again, other = batch(items, 0, 5, 8), batch(items, 0, 5, 8), batch(items, 0, 6, 8)
    assert [caption for caption, _ in first] == [caption for caption, _ in again]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert [caption for caption, _ in first] != [caption for caption, _ in other]
    drawn = [caption for caption, _ in batch(items, 0, 0, 1500)]
    strong = {item.caption for item in items if item.dose == 64}
    share = sum(caption in strong for caption in drawn) / len(drawn)
    expected = 6 * 64 / sum(item.dose for item in items)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


def test_dropped_captions_leave_the_pictures_as_they_are():
    items = planted_set(0)
    kept, dropped = batch(items, 0, 5, 400), batch(items, 0, 5, 400, dropout=0.1)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(kept, dropped, strict=True))
    changed = [(a, b) for (a, _), (b, _) in zip(kept, dropped, strict=True) if a != b]
    assert {b for _, b in changed} == {""}
    assert abs(len(changed) / 400 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 400)


def test_another_seed_plants_something_else():
    a, b = planted_set(0), planted_set(1)
    assert [i.name for i in a] != [i.name for i in b]
    assert not np.array_equal(a[0].mask, b[0].mask) or not np.array_equal(a[0].probe, b[0].probe)
