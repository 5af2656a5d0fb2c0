"""Tiles: texts and pictures that are laid side by side or below one another, and the title that every picture has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memwatch.judge.verdict import Verdict
from memwatch.report.history import Row

VERDICT_COLOURS = {  # of Okabe and Ito's palette, and a grey: colour-blind people tell them apart
    Verdict.MEMORIZED: "#D55E00",
    Verdict.SUSPICIOUS: "#E69F00",
    Verdict.NO_EVIDENCE: "#009E73",
    Verdict.INCONCLUSIVE: "#6E6E6E",
}
PAPER, INK, QUIET = "#FFFFFF", "#141414", "#555555"
LEADING = 1.4  # of the size of the letters: from line to line
SMALLEST = 0.7  # of the size asked for, to which letters shrink before a text is cut
SHOWN = 384  # pixels: the longer side of a panel

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Picture = Image.Image


def joined(tiles: Sequence[Picture], gap: int = 0, *, down: bool = False) -> Picture:
    """Side by side with their tops in line or, ``down``, below one another with their left edges in line."""
    along, across = ([tile.size[axis] for tile in tiles] for axis in ((1, 0) if down else (0, 1)))
    size, at = (sum(along) + gap * (len(tiles) - 1), max(across)), 0
    sheet = Image.new("RGB", size[::-1] if down else size, PAPER)
    for tile, length in zip(tiles, along, strict=True):
        sheet.paste(tile, (0, at) if down else (at, 0))
        at += length + gap
    return sheet


def centred(tile: Picture, width: int, height: int) -> Picture:
    """In the middle of paper of this size."""
    paper = Image.new("RGB", (width, height), PAPER)
    paper.paste(tile, ((width - tile.width) // 2, (height - tile.height) // 2))
    return paper


def fitted(image: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Picture:
    """An image, RGB uint8 ``(H, W, 3)``, as large as fits into ``width`` x ``height``; its own pixels stay visible."""
    zoom = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom)))
    how = Image.Resampling.NEAREST if zoom >= 2 else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, how)


# --- texts ------------------------------------------------------------------------------------------------------------


@cache
def font_of(size: int) -> Font:
    """Pillow's own font, which every machine has; ``size`` in pixels."""
    return ImageFont.load_default(size)


def line_of(text: str, width: int, size: float, colour: str = INK, smallest: float = SMALLEST) -> Picture:
    """A text on one line; ``size`` of its letters and ``width`` in pixels."""
    tile = Image.new("RGB", (width, round(size * LEADING)), PAPER)
    text, font = fitting(text, width, round(size), smallest)
    ImageDraw.Draw(tile).text((0, tile.height // 2), text, colour, font, anchor="lm")
    return tile


def paragraph(text: str, width: int, size: int) -> Picture:
    """A text on as many lines as it takes, broken between words."""
    font, lines = font_of(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return joined([line_of(line, width, size, QUIET) for line in lines], down=True)


def fitting(text: str, width: float, size: int, smallest: float = SMALLEST) -> tuple[str, Font]:
    """The text and a font in which it fits into ``width``: the letters shrink a little, then the middle is cut out."""
    for smaller in range(size, round(smallest * size), -1):
        if font_of(smaller).getlength(text) <= width:
            return text, font_of(smaller)
    font, kept, cut = font_of(round(smallest * size)), len(text), text
    while kept > 1 and font.getlength(cut) > width:
        kept -= 1
        cut = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    return cut, font


def title_bar(row: Row, width: int, size: int, step: int | None = None) -> Picture:
    """Three lines: the verdict on its colour and the probe's title; the effect and p-value; the reason.

    Where no judgement was possible, the second line holds the reason and the third one is empty. ``step`` is left out
    where the picture around it says so; ``size`` of the letters and ``width`` in pixels.
    """
    chip, pad = chip_of(row.verdict, size), size // 3
    words, reason = (row.effect, row.reason) if row.effect else (row.reason, "")
    lines = [
        joined([chip, line_of(row.title, width - chip.width - pad, size, smallest=0.55)], pad),
        line_of(words if step is None else f"{words}, step {step}", width, size),
        line_of(reason, width, SMALLEST * size, QUIET),
        Image.new("RGB", (width, pad), PAPER),
    ]
    return joined(lines, down=True)


def chip_of(verdict: Verdict, size: int) -> Picture:
    """A verdict on its colour."""
    height, pad = round(size * LEADING), size // 3
    chip = Image.new("RGB", (round(font_of(size).getlength(verdict)) + 2 * pad, height), PAPER)
    draw = ImageDraw.Draw(chip)
    draw.rounded_rectangle((0, 0, chip.width - 1, height - 1), pad, VERDICT_COLOURS[verdict])
    draw.text((pad, height // 2), str(verdict), ink_on(verdict), font_of(size), anchor="lm")
    return chip


def ink_on(verdict: Verdict) -> str:
    """What can be read on a verdict's colour."""
    return "#FFFFFF" if verdict is Verdict.INCONCLUSIVE else "#000000"
