"""How well maps agree with masks, and tell memorized from other images. Pure functions.

The oracle is the protocol of Kim & Lee (ICML 2026): log1p, min-max over the whole set, best of 101 thresholds, each
number at its own best. No user has that threshold, so ``evaluate.py`` gives every number at a fixed one as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

THRESHOLDS = np.linspace(-1e-6, 1 + 1e-6, 101)
Scores = Sequence[float] | np.ndarray


class Overlap(NamedTuple):
    """Agreement of predicted with true pixels over a set, each in [0, 1].

    Attributes:
        iou: pixels of the whole set pooled.
        miou: mean over samples of their own IoU; empty against empty counts 1.
        accuracy: share of pixels that agree.
    """

    iou: float
    miou: float
    accuracy: float


def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool arrays of one shape, all pixels pooled; 1 when both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def overlap(predicted: np.ndarray, truth: np.ndarray) -> Overlap:
    """``Overlap`` of bool arrays ``(n, h, w)``."""
    each = [iou(p, t) for p, t in zip(predicted, truth, strict=True)]
    return Overlap(iou(predicted, truth), float(np.mean(each)), float(np.mean(predicted == truth)))


def normalized(maps: np.ndarray) -> np.ndarray:
    """log1p, then min-max over the whole set, to [0, 1]. Negative values count as 0; the published maps have none."""
    values = np.log1p(np.clip(maps, 0, None))
    low, high = values.min(), values.max()
    scaled: np.ndarray = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return scaled


def best_of_thresholds(maps: np.ndarray, masks: np.ndarray) -> Overlap:
    """The published oracle: ``normalized`` maps at 101 thresholds; IoU, mIoU and accuracy each at its own best one.

    Args:
        maps: ``(n, h, w)``, any unit, finite.
        masks: ``(n, h, w)``, bool.
    """
    values = normalized(maps)
    return Overlap(*map(max, zip(*(overlap(values > threshold, masks) for threshold in THRESHOLDS), strict=True)))


def auc(positives: Scores, negatives: Scores) -> float:
    """Probability that a positive exceeds a negative, ties counting half; neither is empty."""
    is_positive = np.repeat([True, False], [len(positives), len(negatives)])
    return float(roc_auc_score(is_positive, np.concatenate([positives, negatives])))


def tpr_at_fpr(positives: Scores, negatives: Scores, fpr: float = 0.01) -> float:
    """Largest true-positive rate of any threshold whose false-positive rate is at most ``fpr``; neither is empty."""
    return float(np.mean(np.asarray(positives) > threshold_at(np.asarray(negatives), fpr)))


def threshold_at(negatives: np.ndarray, fpr: float = 0.01) -> float:
    """The lowest of the scores that no more than this share of the negatives exceeds; they are not empty."""
    return float(np.sort(negatives)[::-1][math.floor(fpr * len(negatives) + 1e-9)])


def resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear, with antialiasing when it shrinks; unchanged when the shape is the same already."""
    if values.shape == shape:
        return values
    tensor = torch.from_numpy(values)[None, None]
    result: np.ndarray = torch.nn.functional.interpolate(tensor, shape, mode="bilinear", antialias=True)[0, 0].numpy()
    return result
