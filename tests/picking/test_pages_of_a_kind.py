"""Pages of one kind have much in common, and no shared part for it; a part that is really there is found among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from support.picked import photo, with_logo

from memwatch.picking import parts as module
from memwatch.picking.pick import choose
from memwatch.picking.rows import as_training_set
from memwatch.picking.survey import GroupKind, survey

SIDE, NUMBER = 256, 60


@pytest.fixture(autouse=True)
def fixed_only(monkeypatch):
    """Parts at other places have tests of their own."""
    monkeypatch.setattr(module, "has_opencv", lambda: False)


def page(seed: int, draw: Callable[[np.random.Generator, ImageDraw.ImageDraw], None]) -> Image.Image:
    """A white page with random ink."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw(np.random.default_rng(seed), ImageDraw.Draw(picture))
    return picture


def words(rng: np.random.Generator, ink: ImageDraw.ImageDraw) -> None:
    """Lines at the same height in every page, of other words."""
    for y in range(10, SIDE - 20, 18):
        line = " ".join("".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], rng.integers(2, 9))) for _ in range(9))
        ink.text((10, y), line[:38], fill="black")


def lines(rng: np.random.Generator, ink: ImageDraw.ImageDraw) -> None:
    for _ in range(12):
        ink.line(rng.integers(0, SIDE, 4).tolist(), fill="black", width=2)


def bars(rng: np.random.Generator, ink: ImageDraw.ImageDraw) -> None:
    """Rows of black boxes of random widths, on one grid of rows."""
    for y in range(8, SIDE - 8, 16):
        x = 8
        while x < SIDE - 56:
            width = int(rng.integers(8, 48))
            ink.rectangle((x, y, x + width, y + 8), fill="black")
            x += width + 8


def letterhead(picture: Image.Image) -> Image.Image:
    """A logo, a name and a line at the top."""
    ink = ImageDraw.Draw(picture)
    ink.rectangle((0, 0, SIDE, 48), fill="white")
    ink.text((60, 6), "Northwind Traders", fill=(20, 40, 120), font=ImageFont.load_default(20))
    ink.line((8, 46, SIDE - 8, 46), fill=(20, 40, 120), width=2)
    return with_logo(picture, 10, 6, 36)


def found(pictures: list[Image.Image]) -> tuple[list[tuple[int, ...]], int]:
    """The rows of every shared part, and how many controls are held out."""
    rows = as_training_set(pictures)
    survey_ = survey(rows)
    picked = choose(rows, survey_, probes=16, controls=20, seed=0)
    return [group.rows for group in survey_.groups if group.kind is GroupKind.PART], len(picked.held_out)


@pytest.mark.parametrize("ink", [words, lines, bars])
def test_what_all_pages_of_a_kind_share_is_no_part(ink):
    assert found([page(i, ink) for i in range(NUMBER)]) == ([], 12)


def test_a_letterhead_is_found_among_pages():
    pages = [page(i, words) for i in range(NUMBER)]
    assert found([letterhead(p) if i < 10 else p for i, p in enumerate(pages)]) == ([tuple(range(10))], 12)


def test_a_logo_on_every_picture_is_a_part_and_controls_are_held_out():
    pictures = [with_logo(photo(i, SIDE), 190, 20, 44) for i in range(NUMBER)]
    assert found(pictures) == ([tuple(range(NUMBER))], 12)
