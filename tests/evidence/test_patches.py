"""Patches are found again as a slow twin finds them: at any exposure, near their place, inside the mask alone."""

from __future__ import annotations

import numpy as np
import pytest
from evidence.old.patches import INSIDE, MATCH, PATCH, REACH, TEXTURE, extent, matching_share, windows
from evidence.worlds.shapes import ellipse, rectangle
from support.textures import textures

WHOLE = np.ones((64, 64), dtype=bool)
DISC = ellipse(30, 25, 11, 9)


def slow_share(target: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> float:
    """One patch and one shift at a time."""
    rows, columns = extent(mask.any(1)), extent(mask.any(0))
    padded = np.pad(picture / 255, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    found = []
    for top in np.argmax(windows(rows.stop - rows.start), axis=1) + rows.start:
        for left in np.argmax(windows(columns.stop - columns.start), axis=1) + columns.start:
            here = slice(top, top + PATCH), slice(left, left + PATCH)
            a = target[here][mask[here]] / 255
            if len(a) < INSIDE * PATCH**2 or np.square(a - a.mean(0)).mean() < TEXTURE**2:
                continue
            best = -1.0
            for down in range(2 * REACH + 1):
                for right in range(2 * REACH + 1):
                    b = padded[top + down : top + down + PATCH, left + right : left + right + PATCH][mask[here]]
                    x, y = (a - a.mean(0)).ravel(), (b - b.mean(0)).ravel()
                    best = max(best, float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-9)))
            found.append(best >= MATCH)
    return float(np.mean(found))


@pytest.mark.parametrize("mask", [DISC, rectangle(0, 41, 23, 64), WHOLE], ids=["disc", "corner", "whole"])
def test_the_share_of_patches_is_that_of_a_slow_twin(mask):
    target, *others = textures(3)
    blended = [(0.6 * target + 0.4 * other).astype(np.uint8) for other in others]
    share = matching_share(target, np.stack([*blended, others[0]]), mask)
    assert share == pytest.approx([slow_share(target, picture, mask) for picture in [*blended, others[0]]])
    assert 0 < share[0] < 1


def test_exposure_small_shifts_and_what_lies_outside_the_mask_change_nothing():
    target, other = textures(2)
    darker = (0.5 * target + 40).astype(np.uint8)
    outside = np.where(DISC[..., None], target, other)
    near, far = np.roll(target, REACH, axis=1), np.roll(target, 4 * REACH, axis=1)
    same = matching_share(target, np.stack([target, darker, outside, near]), DISC)
    assert same.min() > 0.95
    assert matching_share(target, far[None], DISC)[0] < 0.5


def test_where_nothing_can_be_recognized_nothing_is_found():
    flat = np.full((64, 64, 3), 90, dtype=np.uint8)
    assert matching_share(flat, flat[None], WHOLE).tolist() == [0]
    assert matching_share(textures(1)[0], flat[None], WHOLE).tolist() == [0]


def test_a_region_thinner_than_a_patch_is_still_compared():
    thin = rectangle(57, 10, 64, 24)  # 7 pixels wide, at the border
    target, other = textures(2)
    assert matching_share(target, np.stack([target, other]), thin) == pytest.approx([1, 0])
    assert extent(thin.any(0)) == slice(56, 64)
