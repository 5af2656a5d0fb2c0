"""Copies: whether a generation is nearer to a picture than other pictures come by chance. Pure functions on arrays.

Yoon et al. 2023 and Bonnaire et al. 2025 call a generation a copy when its distance to a training image is below a
third of its distance to the nearest other one. Here the distance is taken inside a mask, at any exposure, and the other
pictures are many views of a few: the more there are, the nearer the nearest one comes, and the stricter the rule is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist

from memwatch.judge.copied import COPY

POOL = 256  # views of other pictures, as many as the benchmark has of its own
SMALLEST_VIEW = 0.5  # side of a view, share of its picture's
SIDE = 64  # pixels: pictures are compared at this size at most; in larger ones a shift by a pixel would decide
FLAT = 0.02  # contrast (root mean square, 1 is from black to white) below which there is nothing to copy


def unexposed(pictures: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels ``(n, pixels, 3)`` inside a bool mask ``(H, W)``, without each channel's mean and with unit contrast.

    A copy is one at any exposure: a small model leaves brightness to the initial noise.
    """
    pixels = pictures[:, mask].astype(np.float64)
    pixels = pixels - pixels.mean(1, keepdims=True)
    scaled: np.ndarray = pixels / np.sqrt(np.square(pixels).mean((1, 2), keepdims=True) + 1e-8)
    return scaled


def copy_ratios(target: np.ndarray, pictures: np.ndarray, others: np.ndarray, mask: np.ndarray) -> list[float]:
    """Each picture's distance to the target over its distance to the nearest of ``others``, inside a bool mask.

    Target ``(H, W, 3)``, pictures and others ``(n, H, W, 3)``, in [0, 1]. A ratio is infinite without other pictures,
    where the nearest one is the same, and where the target is flat: that looks like any other one at some exposure.
    """
    if len(others) == 0 or contrast(target, mask) < FLAT:
        return [np.inf] * len(pictures)
    own, nearest = distances(target[None], pictures, mask)[0], distances(pictures, others, mask).min(1)
    found: list[float] = np.divide(own, nearest, out=np.full(len(pictures), np.inf), where=nearest > 0).tolist()
    return found


def grade_of(target: np.ndarray, pictures: np.ndarray, chance: np.ndarray, mask: np.ndarray) -> float | None:
    """How much nearer to the target pictures are than those that are alike by chance, inside a bool mask.

    ``G = 1 - d(pictures) / d(chance)``, where d is the mean distance to the target: 0 is chance, 1 is identical, and
    below 0 they are farther than chance. Shapes and range as in ``copy_ratios``; ``None`` where copies cannot be told.
    """
    if len(pictures) == 0 or len(chance) == 0 or contrast(target, mask) < FLAT:
        return None
    own, by_chance = (float(distances(target[None], group, mask).mean()) for group in (pictures, chance))
    return 1 - own / by_chance if by_chance > 0 else None


def sibling_grade(pictures: np.ndarray, chance: np.ndarray, mask: np.ndarray) -> float | None:
    """``grade_of`` the other ones to each picture, the mean: for those of one prompt, which has no image."""
    found = [grade_of(target, np.delete(pictures, i, 0), chance, mask) for i, target in enumerate(pictures)]
    known = [grade for grade in found if grade is not None]
    return float(np.mean(known)) if known else None


def distances(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Euclidean, between all pairs of ``unexposed`` pictures, ``(len(a), len(b))``."""
    vectors_a, vectors_b = (unexposed(group, mask).reshape(len(group), -1) for group in (a, b))
    found: np.ndarray = cdist(vectors_a, vectors_b)
    return found


def uncopied(targets: np.ndarray, pictures: np.ndarray, others: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pictures that copy none of the targets, see ``copy_ratios``; all of them without others."""
    if len(others) == 0:
        return pictures
    nearest = distances(pictures, others, mask).min(1)
    kept: np.ndarray = pictures[(distances(targets, pictures, mask) >= COPY * nearest).all(0)]
    return kept


def contrast(picture: np.ndarray, mask: np.ndarray) -> float:
    """Root mean square of a picture's pixels inside a mask, without the mean of each channel; 0 for an empty mask."""
    pixels = picture[mask].astype(np.float64)
    return float(np.sqrt(np.square(pixels - pixels.mean(0)).mean())) if len(pixels) else 0.0


def sibling_ratios(pictures: np.ndarray, others: np.ndarray, mask: np.ndarray) -> list[float]:
    """``copy_ratios`` of every picture to the nearest of the other ones: those of one prompt, whatever their seed."""
    found = np.array([copy_ratios(target, pictures, others, mask) for target in pictures])
    np.fill_diagonal(found, np.inf)
    nearest: list[float] = found.min(axis=0).tolist()
    return nearest


def comparable(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """RGB uint8 pictures of one size as they are compared: ``(n, h, w, 3)`` in [0, 1], ``SIDE`` pixels at most."""
    sides = tuple(min(SIDE, side) for side in pictures[0].shape[1::-1])
    small = [np.asarray(Image.fromarray(picture).resize(sides, Image.Resampling.BOX)) for picture in pictures]
    return np.stack(small) / 255


def mask_at(inside: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A region, bool ``(h, w)`` on the grid of latents, as pixels ``shape``; it never vanishes."""
    share = Image.fromarray(inside.astype(np.float32)).resize(shape[::-1], Image.Resampling.BOX)
    mask: np.ndarray = np.asarray(share) >= min(0.5, float(np.asarray(share).max()) or 1.0)
    return mask


@dataclass(frozen=True)
class Pool:
    """The pictures of all probes, by name, and many views of each.

    Attributes:
        whole, views: see ``comparable``; the views begin with the whole pictures.
        controls: names of those that were never trained on.
    """

    whole: Mapping[str, np.ndarray]
    views: Mapping[str, np.ndarray]
    controls: Collection[str]

    @classmethod
    def of(cls, pictures: Mapping[str, np.ndarray], controls: Collection[str] = ()) -> Pool:
        """From RGB uint8 pictures ``(n, H, W, 3)`` of one size: ``POOL`` views also without those of any one name."""
        fewest = sum(map(len, pictures.values())) - max(map(len, pictures.values()), default=0)
        each = -(-POOL // max(1, fewest))
        whole = {name: comparable(group) for name, group in pictures.items()}
        views = {name: np.concatenate([views_of(p, each) for p in group]) for name, group in pictures.items()}
        return cls(whole, views, controls)

    def without(self, names: Collection[str]) -> Pool:
        """The pool of all other names."""
        whole, views = ({n: p for n, p in held.items() if n not in names} for held in (self.whole, self.views))
        return Pool(whole, views, self.controls)

    def others(self, name: str, targets: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, int]:
        """Views ``(n, H, W, 3)`` of all that is not ``name``, and of how many names they are.

        A trained image that is itself a copy of one of ``targets`` inside the mask is left out: a template in two
        training images is no chance.
        """
        rest = [other for other in self.whole if other != name]
        twins = self._twins(rest, targets, mask)
        kept = [self.views[other] for other in rest if other not in twins]
        return np.concatenate(kept) if kept else np.zeros((0, *targets.shape[1:])), len(kept)

    def _twins(self, names: Sequence[str], targets: np.ndarray, mask: np.ndarray) -> set[str]:
        """Those trained on that copy a target, judged by the controls; without controls, by the crops of all names."""
        of_controls = [self.views[name] for name in names if name in self.controls]
        crops = of_controls or [self.views[name][len(self.whole[name]) :] for name in names]
        trained = [(name, picture) for name in names if name not in self.controls for picture in self.whole[name]]
        if not trained:
            return set()
        owners, pictures = zip(*trained, strict=True)
        ratios = [copy_ratios(target, np.stack(pictures), np.concatenate(crops), mask) for target in targets]
        return {owner for found in ratios for owner, ratio in zip(owners, found, strict=True) if ratio < COPY}


def views_of(picture: np.ndarray, count: int) -> np.ndarray:
    """``comparable`` views of a picture, always the same: itself, and ``count - 1`` crops, every other one mirrored."""
    rng, whole = np.random.default_rng(0), Image.fromarray(picture)
    width, height = whole.size
    found = [picture]
    for i in range(1, count):
        share = rng.uniform(SMALLEST_VIEW, 1)
        left, top = rng.uniform(0, width * (1 - share)), rng.uniform(0, height * (1 - share))
        box = (left, top, left + width * share, top + height * share)
        view = whole.resize((width, height), Image.Resampling.BICUBIC, box=box)
        found.append(np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else view))
    return comparable(found)
