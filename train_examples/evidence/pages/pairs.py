"""Pairs labelled by eye: an item beside what its caption generates, against which the graded copy's threshold is set.

``write_sheets`` makes the pictures. A person writes ``copied`` or ``not`` beside every number into ``pairs.csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evidence.metrics import auc
from evidence.verdicts.truth import COPIED, Truth
from evidence.worlds.items import PLANTED, Item

NUM_PAIRS, PER_SHEET = 100, 25
SHOWN = 6  # generations of each pair: the nearest ones
ZOOM, GAP, TEXT = 2, 4, 14  # pixels
LABELS = {"copied": True, "not": False}


@dataclass(frozen=True)
class Labelled:
    """One pair. ``label``: what eyes say; ``None`` before."""

    run: str
    item: str
    step: int
    grade: float
    label: bool | None = None


def chosen_pairs(truths: Sequence[Truth], seed: int = 0) -> list[tuple[Truth, Item, int]]:
    """Spread evenly over the upper two thirds of grades: items of both halves, where both twins were asked."""
    rng, found = np.random.default_rng(seed), []
    for truth in truths:
        for item in (i for i in truth.run.items if i.kind in PLANTED):
            steps = [s for s in truth.generated_steps if truth.grade(item, s) is not None]
            found += [(truth, item, step) for step in steps]
    found.sort(key=lambda row: row[0].grade(*row[1:]) or 0.0)
    upper = found[len(found) // 3 :]  # where the question is open
    places = np.linspace(0, len(upper) - 1, min(NUM_PAIRS, len(upper))).round().astype(int)
    return [upper[int(i)] for i in rng.permutation(np.unique(places))]


def strip(truth: Truth, item: Item, step: int, number: int) -> Image.Image:
    """The item, what is fixed of it, and its nearest generations."""
    pictures = truth.run.generated(item, step)
    assert pictures is not None
    nearest = np.argsort(truth.distances(truth.run, item, step))[:SHOWN]
    target = (truth.run.target(item) * 255).astype(np.uint8)
    dimmed = np.where(item.mask[..., None], target, 128 + target // 8).astype(np.uint8)
    tiles = [target, dimmed, *pictures[nearest]]
    side = ZOOM * target.shape[0]
    sheet = Image.new("RGB", (len(tiles) * (side + GAP) + 40, side + GAP), "white")
    ImageDraw.Draw(sheet).text((4, side // 2), str(number), "black", ImageFont.load_default(TEXT + 4))
    for i, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST), (40 + i * (side + GAP), 0))
    return sheet


def write_sheets(truths: Sequence[Truth], folder: Path) -> Path:
    """``pairs-1.png`` ... and ``pairs.csv`` with an empty column ``label``, unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, file = chosen_pairs(truths), folder / "pairs.csv"
    strips = [strip(*pair, number) for number, pair in enumerate(pairs)]
    for n, start in enumerate(range(0, len(strips), PER_SHEET), start=1):
        part = strips[start : start + PER_SHEET]
        sheet = Image.new("RGB", (part[0].width, sum(s.height for s in part)), "white")
        for i, one in enumerate(part):
            sheet.paste(one, (0, i * one.height))
        sheet.quantize(256).save(folder / f"pairs-{n}.png", optimize=True)
    if not file.is_file():
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["number", "run", "item", "step", "grade", "label"])
            for number, (truth, item, step) in enumerate(pairs):
                writer.writerow([number, truth.run.name, item.name, step, f"{truth.grade(item, step):.4f}", ""])
    return file


def read_labels(file: Path) -> list[Labelled]:
    """Every pair that has a label.

    Raises:
        ValueError: a label is none of ``LABELS``.
    """
    found = []
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            if row["label"] not in LABELS:
                raise ValueError(
                    f"{file}: pair {row['number']} has label {row['label']!r}, allowed: {', '.join(LABELS)}"
                )
            step, grade = int(row["step"]), float(row["grade"])
            found.append(Labelled(row["run"], row["item"], step, grade, LABELS[row["label"]]))
    return found


def agreement(pairs: Sequence[Labelled]) -> dict[str, float]:
    """How well the grade says what eyes say: AUC, and precision and recall at ``COPIED``."""
    yes, no = ([p.grade for p in pairs if p.label is label] for label in (True, False))
    hits, said = sum(g >= COPIED for g in yes), sum(p.grade >= COPIED for p in pairs)
    return {
        "pairs": float(len(pairs)),
        "copied": float(len(yes)),
        "AUC": auc(yes, no),
        "precision": hits / max(1, said),
        "recall": hits / max(1, len(yes)),
    }
