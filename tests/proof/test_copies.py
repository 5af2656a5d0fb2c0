"""Copies: near at any exposure and inside the mask only, nearer than what comes by chance, and never of nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memwatch.judge.copied import COPY
from memwatch.proof.copies import SIDE, Pool, comparable, copy_ratios, mask_at, sibling_ratios

LEFT = np.zeros((32, 32), dtype=bool)
LEFT[:, :16] = True
EVERYWHERE = np.ones((32, 32), dtype=bool)


def photo(seed: int, side: int = 32) -> np.ndarray:
    """A smooth picture as photographs are, RGB uint8: a few waves of random direction."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:side, :side] / side
    waves = [
        rng.uniform(-1, 1, 3) * np.sin(2 * np.pi * (rng.uniform(-4, 4) * x + rng.uniform(-4, 4) * y) + phase)[..., None]
        for phase in rng.uniform(0, 6, 12)
    ]
    return (127 + 30 * np.sum(waves, axis=0)).clip(0, 255).astype(np.uint8)


def photos(*seeds: int) -> np.ndarray:
    return np.stack([photo(seed) for seed in seeds])


OTHERS = photos(*range(10, 30)) / 255


def copied(target, pictures, mask=EVERYWHERE, others=OTHERS):
    return [ratio < COPY for ratio in copy_ratios(target, np.stack(pictures), others, mask)]


def test_a_copy_is_one_at_any_exposure_and_with_a_little_noise_and_another_picture_is_none():
    target = photo(0) / 255
    noisy = target + np.random.default_rng(0).normal(0, 0.02, target.shape)
    tinted = target * 0.5 + np.array([0.3, 0.0, 0.1])
    assert copied(target, [target, target * 0.4, tinted, noisy]) == [True] * 4
    assert copied(target, [photo(1) / 255, target[:, ::-1], np.full_like(target, 0.5), OTHERS[3]]) == [False] * 4


def test_a_copy_only_inside_the_region_counts_there_alone():
    target, mixed = photo(0) / 255, photo(1) / 255
    mixed[LEFT] = target[LEFT]
    assert copied(target, [mixed], LEFT) == [True]
    assert copied(target, [mixed], ~LEFT) == [False]
    assert copied(target, [mixed], EVERYWHERE) == [False]


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_nobody_can_tell_a_copy_of_a_flat_region_or_without_pictures_to_compare(level):
    flat = np.full((32, 32, 3), level)
    pictures = np.stack([flat, photo(1) / 255])
    for others in (OTHERS, np.stack([flat, flat])):
        assert copy_ratios(flat, pictures, others, EVERYWHERE) == [math.inf, math.inf]
    target = photo(0) / 255
    assert copy_ratios(target, target[None], OTHERS[:0], EVERYWHERE) == [math.inf]  # there are no other pictures
    assert copy_ratios(target, target[None], OTHERS, ~EVERYWHERE) == [math.inf]  # no pixels
    grainy = flat + np.random.default_rng(0).normal(0, 0.005, flat.shape)
    assert copy_ratios(grainy, grainy[None], OTHERS, EVERYWHERE) == [math.inf]


def test_siblings_copy_each_other():
    alike, other = photo(0) / 255, photo(1) / 255
    found = [ratio < COPY for ratio in sibling_ratios(np.stack([alike, other, alike * 0.7]), OTHERS, EVERYWHERE)]
    assert found == [True, False, True]
    assert sibling_ratios(alike[None], OTHERS, EVERYWHERE) == [math.inf]


def test_pictures_are_compared_at_one_size():
    assert comparable([photo(0)]).tolist() == (photo(0)[None] / 255).tolist()
    large = photo(0, 4 * SIDE)
    blocks = large.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3)) / 255
    assert np.abs(comparable([large, large]) - blocks).max() < 0.01


def test_a_region_on_the_grid_of_latents_becomes_pixels():
    inside = np.array([[True, False], [False, True]])
    assert mask_at(inside, (4, 4)).tolist() == np.kron(inside, np.ones((2, 2), bool)).tolist()
    fine = np.kron(inside, np.ones((4, 4), bool))
    assert mask_at(fine, (2, 2)).tolist() == inside.tolist()
    fine[:] = False
    assert not mask_at(fine, (2, 2)).any()
    fine[0, 0] = True
    assert mask_at(fine, (2, 2)).tolist() == [[True, False], [False, False]]  # a region is never lost


@pytest.mark.parametrize("with_controls", [True, False])
def test_a_template_in_two_training_images_is_no_chance(with_controls):
    """The other one is left out where both have it, and counts elsewhere; a control counts everywhere."""
    template = photo(0)
    twin = photo(1)
    twin[LEFT] = template[LEFT]
    pictures = {"a": template[None], "twin": twin[None], **{f"c{i}": photos(40 + i) for i in range(6)}}
    controls = {f"c{i}" for i in range(6)} if with_controls else set()
    targets = template[None] / 255
    pool = Pool.of(pictures, controls)
    assert pool.others("a", targets, LEFT)[1] == 6
    assert pool.others("a", targets, ~LEFT)[1] == 7
    others, _ = pool.others("a", targets, LEFT)
    assert copied(targets[0], [twin / 255], LEFT, others) == [True]
    if with_controls:
        assert Pool.of(pictures, controls | {"twin"}).others("a", targets, LEFT)[1] == 7
