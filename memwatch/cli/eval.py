"""``memwatch eval MAPS MASKS``: how well a folder of maps finds what a folder of masks says is memorized."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.cli.metrics import at_threshold, auc, best_of_thresholds, resized, tpr_at_fpr
from memwatch.judge.regions import threshold_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare maps (NAME.npy) with masks (NAME.png); a map without a mask counts as non-memorized."
    add = parser.add_argument
    add("maps", type=Path, help="folder of float arrays (h, w) of any size, larger where more is stored")
    add("masks", type=Path, help="folder of masks of one size, white where memorized")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    add("--threshold", type=float, help="in the maps' unit (default: the one that memwatch takes for each map)")


def run(args: argparse.Namespace) -> int:
    """0; or 1 when files had to be left out."""
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"--threshold: got {args.threshold}, allowed: a finite number")
    samples, problems = read_folders(args.maps, args.masks)
    result = evaluate_sets(samples, args.threshold)
    print(overlap_table(result))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


@dataclass(frozen=True)
class Sample:
    """One map with its mask at the masks' size.

    Attributes:
        values: float64 ``(h, w)``, resized.
        mask: bool ``(h, w)``; all false for non-memorized.
        mean: of the map as it was.
        own_threshold: memwatch's own for this very map, see ``memwatch.judge.regions.threshold_of``.
    """

    name: str
    values: np.ndarray
    mask: np.ndarray
    mean: float
    own_threshold: float

    @property
    def kind(self) -> str:
        """As the paper names its sets: a full mask is verbatim, an empty one non-memorized, any other a template."""
        return "verbatim" if self.mask.all() else "template" if self.mask.any() else "non_memorized"


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
    """Every ``NAME.npy`` of ``maps`` with ``NAME.png`` of ``masks``, and a message for each file that is left out.

    A map without a mask is non-memorized: its mask is all zeros. All masks have one size (the most frequent counts),
    and maps are brought to it.

    Raises:
        ValueError: a folder does not exist, no map could be read, or no mask.
    """
    for what, folder in (("maps", maps), ("masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{what}: {folder} is no folder")
    problems: list[str] = []
    map_files, mask_files = sorted(maps.glob("*.npy")), sorted(masks.glob("*.png"))
    found_masks = dict(_readable(mask_files, read_mask, problems))
    found_maps = dict(_readable(map_files, read_map, problems))
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
        own = threshold_of(values)
        samples.append(Sample(name, resized(values, shape), mask, float(values.mean()), own))
    if not samples:
        raise ValueError("; ".join(["no map is left to evaluate", *problems]))
    return samples, problems


def _readable(
    paths: Sequence[Path], read: Callable[[Path], np.ndarray], problems: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """What can be read, by name; what cannot is added to ``problems``."""
    for path in paths:
        try:
            yield path.stem, read(path)
        except ValueError as error:
            problems.append(str(error))


def evaluate(samples: Sequence[Sample], threshold: float | None = None) -> dict[str, Any]:
    """``fixed`` (at a threshold, or at memwatch's own of every map) and ``oracle``, each ``{iou, miou, accuracy}``.

    ``auc`` and ``tpr_at_1_fpr`` are of the mean of a map, memorized against non-memorized; ``None`` where either is
    missing.
    """
    maps, masks = np.stack([s.values for s in samples]), np.stack([s.mask for s in samples])
    stored = [s.mean for s in samples if s.kind != "non_memorized"]
    others = [s.mean for s in samples if s.kind == "non_memorized"]
    both = bool(stored and others)
    own = np.array([s.own_threshold for s in samples])
    return {
        "fixed": asdict(at_threshold(maps, masks, own if threshold is None else threshold)),
        "oracle": asdict(best_of_thresholds(maps, masks)),
        "auc": auc(stored, others) if both else None,
        "tpr_at_1_fpr": tpr_at_fpr(stored, others, 0.01) if both else None,
    }


def evaluate_sets(samples: Sequence[Sample], threshold: float | None = None) -> dict[str, Any]:
    """``evaluate`` of all samples.

    Where there are others as well, ``template`` holds that of the template samples (localization), judged against the
    non-memorized ones (detection).
    """
    counts = Counter(s.kind for s in samples)
    num_maps = {kind: counts[kind] for kind in ("template", "verbatim", "non_memorized")}
    result = evaluate(samples, threshold) | {"threshold": threshold, "num_maps": num_maps}
    if 0 < counts["template"] < len(samples):
        templates = [s for s in samples if s.kind == "template"]
        detection = evaluate([s for s in samples if s.kind != "verbatim"], threshold)
        result["template"] = evaluate(templates, threshold) | {key: detection[key] for key in ("auc", "tpr_at_1_fpr")}
    return result


def overlap_table(result: Mapping[str, Any]) -> str:
    """``evaluate_sets`` for people."""
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in result["num_maps"].items())
    at = "memwatch's own" if result["threshold"] is None else f"at {result['threshold']:.3g}"
    lines = [f"maps: {counts}", f"{'':<26}{'IoU':>8}{'mIoU':>8}{'accuracy':>10}{'AUC':>8}{'TPR@1%FPR':>11}"]
    for name, part in (("all", result), ("templates", result.get("template"))):
        if part is not None:
            auc_, tpr = ("-" if part[key] is None else f"{part[key]:.3f}" for key in ("auc", "tpr_at_1_fpr"))
            for how, label in (("fixed", at), ("oracle", "best of 101")):
                overlaps = f"{part[how]['iou']:>8.3f}{part[how]['miou']:>8.3f}{part[how]['accuracy']:>10.3f}"
                lines.append(f"{name + ', ' + label:<26}{overlaps}{auc_:>8}{tpr:>11}")
    return "\n".join(lines)
