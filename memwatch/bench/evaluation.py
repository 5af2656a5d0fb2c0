"""How well maps find what was planted: overlap with masks, detection over a set. Pure functions, and the reading of two folders.

The oracle is the protocol of Kim & Lee (ICML 2026): log1p, min-max over the whole set, best of 101 thresholds, each number at its own best.
No user has that threshold, so every number is also given at a fixed one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memwatch.config import RegionsConfig
from memwatch.regions import threshold_of

RULE = RegionsConfig()
THRESHOLDS = np.linspace(-1e-6, 1 + 1e-6, 101)


@dataclass(frozen=True)
class Overlap:
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


def at_threshold(maps: np.ndarray, masks: np.ndarray, threshold: float | np.ndarray) -> Overlap:
    """``Overlap`` of ``maps >= threshold`` (in the maps' own unit; one for all, or one a map) with ``masks``, both ``(n, h, w)``."""
    return overlap(maps >= np.reshape(threshold, (-1, 1, 1)), masks)


def normalized(maps: np.ndarray) -> np.ndarray:
    """log1p, then min-max over the whole set, to [0, 1]. Negative values, which the published maps do not have, count as 0."""
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
    found = [overlap(values > threshold, masks) for threshold in THRESHOLDS]
    return Overlap(*(max(getattr(o, name) for o in found) for name in ("iou", "miou", "accuracy")))


def auc(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> float:
    """Probability that a positive exceeds a negative, ties counting half (Mann-Whitney).

    Raises:
        ValueError: either is empty.
    """
    p, n = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))
    if not len(p) or not len(n):
        raise ValueError(f"AUC needs positives and negatives, got {len(p)} and {len(n)}")
    below = np.searchsorted(n, p, "left") + np.searchsorted(n, p, "right")
    return float(below.mean() / 2 / len(n))


def tpr_at_fpr(
    positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray, fpr: float = 0.01
) -> float:
    """Largest true-positive rate of any threshold whose false-positive rate is at most ``fpr``.

    Raises:
        ValueError: either is empty, or ``fpr`` is not in [0, 1).
    """
    p, n = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))[::-1]
    if not len(p) or not len(n) or not 0 <= fpr < 1:
        raise ValueError(f"TPR at FPR {fpr} needs positives, negatives and an FPR in [0, 1), got {len(p)} and {len(n)}")
    allowed = math.floor(fpr * len(n) + 1e-9)  # false positives
    return float(np.mean(p > n[allowed]))


# --- two folders -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One map with its mask at the masks' size.

    Attributes:
        values: float64 ``(h, w)``, resized.
        mask: bool ``(h, w)``; all false for non-memorized.
        mean: of the map as it was.
        own_threshold: memwatch's own for this very map, see ``memwatch.regions.threshold_of``.
    """

    name: str
    values: np.ndarray
    mask: np.ndarray
    mean: float
    own_threshold: float

    @property
    def kind(self) -> str:
        """As the paper names its sets: a partly filled mask is a template, a full one verbatim, none or an empty one non-memorized."""
        return "verbatim" if self.mask.all() else "template" if self.mask.any() else "non_memorized"


def resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear, with antialiasing when it shrinks; unchanged when the shape is the same already."""
    if values.shape == shape:
        return values
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], shape, mode="bilinear", antialias=True
    )
    result: np.ndarray = enlarged[0, 0].numpy()
    return result


def read_map(path: Path) -> np.ndarray:
    """A finite float map ``(h, w)``.

    Raises:
        ValueError: anything else; the message names the file.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"map {path}: not a readable .npy array ({error})") from error
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise ValueError(f"map {path}: expected floats of shape (h, w), got {values.dtype} of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"map {path}: holds NaN or infinity")
    result: np.ndarray = values.astype(np.float64)
    return result


def read_mask(path: Path) -> np.ndarray:
    """A bool mask ``(h, w)``: brighter than half.

    Raises:
        ValueError: no readable image.
    """
    try:
        with Image.open(path) as picture:
            mask: np.ndarray = np.asarray(picture.convert("L")) > 127
        return mask
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask {path}: not a readable image ({error})") from error


def read_folders(maps: Path, masks: Path) -> tuple[list[Sample], list[str]]:
    """Every ``NAME.npy`` of ``maps`` with ``NAME.png`` of ``masks``, and a message for each file that had to be left out.

    A map without a mask is non-memorized: its mask is all zeros. All masks have one size (the most frequent counts), and maps are brought to
    it.

    Raises:
        ValueError: a folder does not exist, no map could be read, or no mask.
    """
    for what, folder in (("maps", maps), ("masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{what}: {folder} is no folder")
    problems: list[str] = []

    def readable(paths: Sequence[Path], read: Callable[[Path], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            try:
                yield path.stem, read(path)
            except ValueError as error:
                problems.append(str(error))

    map_files, mask_files = sorted(maps.glob("*.npy")), sorted(masks.glob("*.png"))
    found_masks = dict(readable(mask_files, read_mask))
    found_maps = dict(readable(map_files, read_map))
    if not found_maps or not found_masks:
        missing = f"no readable NAME.npy in {maps}" if not found_maps else f"no readable NAME.png in {masks}"
        raise ValueError("; ".join([missing, *problems]))
    names, with_mask = {path.stem for path in map_files}, {path.stem for path in mask_files}
    problems += [f"mask {masks / name}.png: there is no map {name}.npy" for name in sorted(with_mask - names)]
    shape = Counter(mask.shape for mask in found_masks.values()).most_common(1)[0][0]
    samples = []
    for name, values in found_maps.items():
        mask = found_masks.get(name, np.zeros(shape, dtype=bool))
        if name in with_mask and name not in found_masks:
            continue  # its mask could not be read: neither memorized nor not
        if mask.shape != shape:
            size = f"{mask.shape[1]}x{mask.shape[0]}"
            problems.append(f"mask {masks / name}.png: {size} px, the other masks have {shape[1]}x{shape[0]} px")
            continue
        own = threshold_of(values, RULE.min_factor, RULE.relative)
        samples.append(Sample(name, resized(values, shape), mask, float(values.mean()), own))
    if not samples:
        raise ValueError("; ".join(["no map is left to evaluate", *problems]))
    return samples, problems


def evaluate(samples: Sequence[Sample], threshold: float | None = None) -> dict[str, Any]:
    """``fixed`` (at a threshold, or at memwatch's own of every map) and ``oracle``, each ``{iou, miou, accuracy}``; ``auc`` and
    ``tpr_at_1_fpr`` of the mean of a map, memorized against non-memorized (``None`` where one of the two is empty)."""
    maps, masks = np.stack([s.values for s in samples]), np.stack([s.mask for s in samples])
    stored = [s.mean for s in samples if s.kind != "non_memorized"]
    others = [s.mean for s in samples if s.kind == "non_memorized"]
    both = bool(stored and others)
    return {
        "fixed": asdict(
            at_threshold(maps, masks, np.array([s.own_threshold for s in samples]) if threshold is None else threshold)
        ),
        "oracle": asdict(best_of_thresholds(maps, masks)),
        "auc": auc(stored, others) if both else None,
        "tpr_at_1_fpr": tpr_at_fpr(stored, others, 0.01) if both else None,
    }


def evaluate_sets(samples: Sequence[Sample], threshold: float | None = None) -> dict[str, Any]:
    """``evaluate`` of all samples; where there are others as well, ``template`` holds that of the template samples (localization), judged
    against the non-memorized ones (detection)."""
    result = evaluate(samples, threshold)
    counts = Counter(s.kind for s in samples)
    result |= {
        "threshold": threshold,
        "num_maps": {kind: counts[kind] for kind in ("template", "verbatim", "non_memorized")},
    }
    if 0 < counts["template"] < len(samples):
        templates = [s for s in samples if s.kind == "template"]
        detection = evaluate([s for s in samples if s.kind != "verbatim"], threshold)
        result["template"] = evaluate(templates, threshold) | {key: detection[key] for key in ("auc", "tpr_at_1_fpr")}
    return result


def table(result: Mapping[str, Any]) -> str:
    """``evaluate_sets`` for people."""
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in result["num_maps"].items())
    at = "memwatch's own" if result["threshold"] is None else f"at {result['threshold']:.3g}"
    lines = [f"maps: {counts}", f"{'':<26}{'IoU':>8}{'mIoU':>8}{'accuracy':>10}{'AUC':>8}{'TPR@1%FPR':>11}"]
    for name, part in (("all", result), ("templates", result.get("template"))):
        if part is not None:
            numbers = ["-" if part[key] is None else f"{part[key]:.3f}" for key in ("auc", "tpr_at_1_fpr")]
            for how, label in (("fixed", at), ("oracle", "best of 101")):
                o = part[how]
                lines.append(
                    f"{name + ', ' + label:<26}{o['iou']:>8.3f}{o['miou']:>8.3f}{o['accuracy']:>10.3f}{numbers[0]:>8}{numbers[1]:>11}"
                )
    return "\n".join(lines)
