"""A training set made by code, of any size, with near-duplicates and shared parts planted: 256 px JPEG files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

SIDE = 256  # pixels
SHARE = 20  # one row in so many is of each kind that is planted
LARGE = 3  # parts on many rows; see ``sizes_of``
SMALL = 10  # rows of a small part
KINDS = ("copies", "fixed", "moved")


@dataclass(frozen=True)
class Plan:
    """What is planted in a set.

    Attributes:
        owner: for each row and kind the number of what is planted, -1 for nothing; ``(3, n)``, see ``KINDS``.
        first: for each row the row that it is a changed copy of; itself where it is none.
        on_white: which rows show something on plain white.
    """

    owner: np.ndarray
    first: np.ndarray
    on_white: np.ndarray


def planned(number: int) -> Plan:
    """The plan of a set of so many rows; always the same."""
    rng = np.random.default_rng(number)
    waiting = iter(rng.permutation(number).tolist())
    owner, first = np.full((len(KINDS), number), -1), np.arange(number)
    for item, size in enumerate(copies_of(number // SHARE, rng)):
        rows = [next(waiting) for _ in range(size)]
        owner[0, rows], first[rows] = item, min(rows)
    for kind in (1, 2):
        for item, size in enumerate(sizes_of(number // SHARE)):
            owner[kind, [next(waiting) for _ in range(size)]] = item
    on_white = np.zeros(number, dtype=bool)
    on_white[[next(waiting) for _ in range(number // SHARE)]] = True
    return Plan(owner, first, on_white)


def copies_of(rows: int, rng: np.random.Generator) -> list[int]:
    """Sizes of groups of copies: one with a fifth of the rows, the others small."""
    sizes = [rows // 5]
    while sum(sizes) < rows:
        sizes.append(int(rng.integers(2, 6)))
    return sizes


def sizes_of(rows: int) -> list[int]:
    """On how many rows each part is: a half, a quarter, an eighth of them, the rest small ones."""
    large = [rows // 2**i for i in range(1, LARGE + 1)]
    return large + [SMALL] * ((rows - sum(large)) // SMALL)


# --- pictures --------------------------------------------------------------------------------------------------------


def picture_of(seed: list[int]) -> Image.Image:
    """Clouds of colour at all scales, and a few shapes in colours of their own."""
    rng = np.random.default_rng(seed)
    values = clouds(rng)
    picture = coloured(values, rng)
    for _ in range(int(rng.integers(3, 9))):
        mask = Image.new("L", (SIDE, SIDE))
        corners = rng.uniform(0, SIDE, 2) + rng.normal(0, rng.uniform(15, 60), (int(rng.integers(3, 7)), 2))
        draw = ImageDraw.Draw(mask)
        if rng.random() < 0.5:
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=255)
        else:
            draw.ellipse((*corners.min(0).tolist(), *corners.max(0).tolist()), fill=255)
        shift = rng.integers(0, SIDE, 2).tolist()
        picture.paste(coloured(np.roll(values, shift, (0, 1)), rng), (0, 0), mask)
    return picture


def clouds(rng: np.random.Generator) -> np.ndarray:
    """Noise of all scales, rough or smooth; ``(SIDE, SIDE)`` uint8."""
    values, strength, fall = np.zeros((SIDE, SIDE), np.float32), 1.0, rng.uniform(0.35, 0.8)
    for cells in (3, 6, 12, 24, 48, 96):
        noise = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        values += np.float32(strength) * np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        strength *= fall
    result: np.ndarray = (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)
    return result


def coloured(values: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Values in four colours, and what lies between them."""
    colours = (rng.uniform(0, 255, (4, 1)) + rng.normal(0, 40, (4, 3))).clip(0, 255)
    of_value = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 4), colours[:, i]) for i in range(3)], axis=-1)
    picture = Image.fromarray(values).convert("P")
    picture.putpalette(of_value.astype(np.uint8).tobytes())
    return picture.convert("RGB")


def product(seed: list[int]) -> Image.Image:
    """Something on plain white."""
    rng = np.random.default_rng([*seed, 1])
    width, height = rng.integers(60, 200, 2).tolist()
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    mask = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((left, top, left + width, top + height), fill=255)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(coloured(clouds(rng), rng), (0, 0), mask)
    return picture


def mark(kind: int, item: int) -> tuple[Image.Image, tuple[int, int]]:
    """A part, and where it is when it does not move: a banner, or a square logo."""
    rng = np.random.default_rng([kind, item, 2])
    is_banner = kind == 1 and item % 2 == 0
    width, height = (SIDE, int(rng.integers(32, 56))) if is_banner else (int(rng.integers(64, 96)),) * 2
    picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(width * height // 400):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = rng.integers(6, 24, 2).tolist()
        draw.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture, (int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1)))


def row_of(plan: Plan, row: int, number: int) -> tuple[Image.Image, int]:
    """The picture of a row, and the quality of its file."""
    rng, first = np.random.default_rng([number, row, 3]), int(plan.first[row])
    picture = (product if plan.on_white[row] else picture_of)([number, first])
    for kind in (1, 2):
        if (item := int(plan.owner[kind, row])) >= 0:
            part, place = mark(kind, item)
            moved = tuple(rng.integers(0, SIDE - part.width + 1, 2).tolist())
            picture.paste(part, place if kind == 1 else moved)
    if first == row:
        return picture, 90
    picture = ImageOps.mirror(picture) if rng.random() < 0.3 else picture
    side = int(rng.integers(160, 321)) if rng.random() < 0.5 else SIDE
    return picture.resize((side, side)), int(rng.integers(50, 91))


def write_rows(folder: Path, number: int, rows: Iterable[int]) -> None:
    """The files of some rows."""
    plan = planned(number)
    for row in rows:
        picture, quality = row_of(plan, row, number)
        picture.save(folder / f"{row:06d}.jpg", quality=quality)
