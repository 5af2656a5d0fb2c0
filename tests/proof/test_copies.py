"""Copies: near at any exposure and inside the mask only, nearer than what comes by chance, and never of nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memwatch.judge.copied import COPY
from memwatch.proof.copies import (
    SIDE,
    Pool,
    comparable,
    copy_ratios,
    grade_of,
    mask_at,
    sibling_grade,
    sibling_ratios,
    uncopied,
)

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


def exposed(picture: np.ndarray) -> np.ndarray:
    """Pixel by pixel, of a picture in [0, 1]: the slow way to what is compared."""
    pixels = picture.reshape(-1, 3)
    pixels = pixels - pixels.mean(0)
    return pixels / math.sqrt((pixels**2).mean())


def test_a_grade_is_the_mean_distance_over_the_mean_distance_of_chance():
    target, made = photo(0) / 255, photos(1, 2, 3) / 255
    made[0] = 0.7 * target + 0.1 * made[0]
    own, chance = (
        np.mean([math.dist(exposed(target).ravel(), exposed(picture).ravel()) for picture in group])
        for group in (made, OTHERS)
    )
    assert grade_of(target, made, OTHERS, EVERYWHERE) == pytest.approx(1 - own / chance, abs=1e-5)


def test_grades_are_one_for_the_same_zero_for_chance_and_half_for_one_of_two():
    target = photo(0) / 255
    same = np.stack([target, target * 0.5 + 0.2])
    assert grade_of(target, same, OTHERS, EVERYWHERE) == pytest.approx(1, abs=1e-5)
    assert grade_of(target, OTHERS, OTHERS, EVERYWHERE) == 0
    assert grade_of(target, np.concatenate([OTHERS, [target] * len(OTHERS)]), OTHERS, LEFT) == pytest.approx(0.5)
    assert grade_of(target, 1 - same, OTHERS, EVERYWHERE) < 0  # the negative is farther than chance


def test_a_grade_needs_something_to_copy_and_something_to_compare_with():
    target, flat = photo(0) / 255, np.full((32, 32, 3), 0.5)
    assert grade_of(flat, target[None], OTHERS, EVERYWHERE) is None
    assert grade_of(target, target[None], OTHERS, ~EVERYWHERE) is None  # no pixels
    assert grade_of(target, target[None], OTHERS[:0], EVERYWHERE) is None
    assert grade_of(target, OTHERS[:0], OTHERS, EVERYWHERE) is None
    assert sibling_grade(target[None], OTHERS, EVERYWHERE) is None  # it has no sibling


def test_the_grade_of_siblings_is_that_of_each_by_the_others():
    alike, other = photo(0) / 255, photo(1) / 255
    assert sibling_grade(np.stack([alike, alike * 0.7]), OTHERS, EVERYWHERE) == pytest.approx(1, abs=1e-5)
    three = np.stack([alike, other, alike])
    each = [grade_of(three[i], three[[j for j in range(3) if j != i]], OTHERS, EVERYWHERE) for i in range(3)]
    assert sibling_grade(three, OTHERS, EVERYWHERE) == pytest.approx(np.mean(each))


def test_what_copies_any_target_is_left_out_of_chance():
    pictures = photos(0, 1, 2) / 255
    assert uncopied(pictures[:2] * 0.8, pictures, OTHERS, EVERYWHERE).tolist() == pictures[2:].tolist()


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
