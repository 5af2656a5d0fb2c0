"""How well a folder of maps finds what a folder of masks says is memorized.

python train_examples/evidence/evaluate.py memwatch-scan/decisive/step_0000000 masks/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memwatch.measure.regions import threshold_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.metrics import auc, best_of_thresholds, overlap, resized, tpr_at_fpr

KINDS = ("template", "verbatim", "non_memorized")


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when files had to be left out; 2 when nothing could be compared."""
    parser = argparse.ArgumentParser(
        description="Compare maps (NAME.npy) with masks (NAME.png); a map without a mask counts as non-memorized."
    )
    add = parser.add_argument
    add("maps", type=Path, help="folder of float arrays (h, w) of any size, larger where more is stored")
    add("masks", type=Path, help="folder of masks of one size, white where memorized")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    add("--threshold", type=float, help="in the maps' unit (default: the one that memwatch takes for each map)")
    args = parser.parse_args(argv)
    try:
        samples, problems = read_folders(args.maps, args.masks)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
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
        own_threshold: memwatch's own for this very map, see ``memwatch.measure.regions.threshold_of``.
    """

    values: np.ndarray
    mask: np.ndarray
    mean: float
    own_threshold: float

    @property
    def kind(self) -> str:
        """As the paper names its sets: a full mask is verbatim, an empty one non-memorized, any other a template."""
        return "verbatim" if self.mask.all() else "template" if self.mask.any() else "non_memorized"


def read_map(file: Path) -> np.ndarray:
    """A map ``(h, w)``, float64. Raises a ``ValueError`` that names the file."""
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"map {file}: not a readable .npy array ({error})") from error
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        found = f"{values.dtype} of shape {values.shape}"
        raise ValueError(f"map {file}: got {found}, allowed: finite numbers of shape (h, w)")
    result: np.ndarray = values.astype(np.float64)
    return result


def read_mask(file: Path) -> np.ndarray | None:
    """A mask ``(h, w)``, true where it is brighter than half; ``None`` without the file.

    Raises:
        ValueError: it is no image.
    """
    if not file.is_file():
        return None
    try:
        with Image.open(file) as picture:
            mask: np.ndarray = np.asarray(picture.convert("L")) > 127
        return mask
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask {file}: not a readable image ({error})") from error


def read_folders(maps: Path, masks: Path) -> tuple[list[Sample], list[str]]:
    """Every ``NAME.npy`` of ``maps`` with ``NAME.png`` of ``masks``, and a message for each file that is left out.

    Maps are brought to the size of the masks, which is the most frequent one. A map without a mask is non-memorized.

    Raises:
        ValueError: no map could be read that has a mask.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    lonely = [file for file in sorted(masks.glob("*.png")) if not (maps / f"{file.stem}.npy").is_file()]
    problems = [f"mask {file}: there is no map {file.stem}.npy" for file in lonely]
    for file in sorted(maps.glob("*.npy")):
        try:
            found[file.stem] = read_map(file), read_mask(masks / f"{file.stem}.png")
        except ValueError as error:
            problems.append(str(error))
    shapes = Counter(mask.shape for _, mask in found.values() if mask is not None)
    if not shapes:
        raise ValueError("; ".join([f"no readable NAME.npy in {maps} has a NAME.png in {masks}", *problems]))
    shape, samples = shapes.most_common(1)[0][0], []
    for name, (values, mask) in found.items():
        mask = np.zeros(shape, dtype=bool) if mask is None else mask
        if mask.shape == shape:
            samples.append(Sample(resized(values, shape), mask, float(values.mean()), threshold_of(values)))
        else:
            problems.append(f"mask {masks / name}.png: got (h, w) {mask.shape}, the other masks have {shape}")
    return samples, problems


def overlaps(samples: Sequence[Sample], threshold: float | None) -> dict[str, Any]:
    """``fixed`` (at a threshold, or at memwatch's own of every map) and ``oracle``, each ``{iou, miou, accuracy}``."""
    maps, masks = np.stack([s.values for s in samples]), np.stack([s.mask for s in samples])
    fixed = np.array([s.own_threshold if threshold is None else threshold for s in samples])
    at_fixed = overlap(maps >= fixed[:, None, None], masks)
    return {"fixed": at_fixed._asdict(), "oracle": best_of_thresholds(maps, masks)._asdict()}


def detection(memorized: Sequence[Sample], others: Sequence[Sample]) -> dict[str, float | None]:
    """``auc`` and ``tpr_at_1_fpr`` of the mean of a map; ``None`` where either kind is missing."""
    if not memorized or not others:
        return {"auc": None, "tpr_at_1_fpr": None}
    means = [s.mean for s in memorized], [s.mean for s in others]
    return {"auc": auc(*means), "tpr_at_1_fpr": tpr_at_fpr(*means, 0.01)}


def evaluate_sets(samples: Sequence[Sample], threshold: float | None = None) -> dict[str, Any]:
    """``overlaps`` and ``detection`` of all samples; where there are others, ``template`` holds the templates' own."""
    template, verbatim, others = ([s for s in samples if s.kind == kind] for kind in KINDS)
    num_maps = dict(zip(KINDS, map(len, (template, verbatim, others)), strict=True))
    result = overlaps(samples, threshold) | detection([*template, *verbatim], others)
    result |= {"threshold": threshold, "num_maps": num_maps}
    if 0 < len(template) < len(samples):
        result["template"] = overlaps(template, threshold) | detection(template, others)
    return result


def overlap_table(result: Mapping[str, Any]) -> str:
    """``evaluate_sets`` for people."""
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in result["num_maps"].items())
    at = "memwatch's own" if result["threshold"] is None else f"at {result['threshold']:.3g}"
    lines = [f"maps: {counts}", f"{'':<26}{'IoU':>8}{'mIoU':>8}{'accuracy':>10}{'AUC':>8}{'TPR@1%FPR':>11}"]
    parts = {"all": result} | ({"templates": result["template"]} if "template" in result else {})
    for name, part in parts.items():
        for how, label in {"fixed": at, "oracle": "best of 101"}.items():
            numbers = [*part[how].values(), part["auc"], part["tpr_at_1_fpr"]]
            cells = ["-" if x is None else f"{x:.3f}" for x in numbers]
            row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 10, 8, 11), strict=True))
            lines.append(f"{f'{name}, {label}':<26}{row}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
