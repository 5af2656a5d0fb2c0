"""Drawing: tiles that are laid side by side or below one another, texts, titles, and heatmaps on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memwatch.judge.verdict import Verdict
from memwatch.measure.regions import Region
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

# Nine stops from black over red to pale yellow, rising in lightness: readable in grey and by colour-blind people.
COLOURS = "000004 280B54 65156E 9F2A63 D44842 F57D15 FAC127 FCE678 FCFFA4"
STOPS = np.array([list(bytes.fromhex(colour)) for colour in COLOURS.split()], dtype=np.float64)
MAX_FACTOR = 4.0  # at the top of the scale, the same in every picture
BAR, PAD = 74, 14  # pixels: width of the colour bar with its labels; paper above and below it

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


def placed(tile: Picture, width: int, height: int, at: tuple[int, int] | None = None) -> Picture:
    """On paper of this size, in the middle by default."""
    paper = Image.new("RGB", (width, height), PAPER)
    paper.paste(tile, at or ((width - tile.width) // 2, (height - tile.height) // 2))
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
    """A text on one line; ``size``: of its letters."""
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

    Where no judgement was possible, the second line holds the reason and the third one is empty.
    """
    line, pad = round(size * LEADING), size // 3
    chip = Image.new("RGB", (round(font_of(size).getlength(row.verdict)) + 2 * pad, line), PAPER)
    draw = ImageDraw.Draw(chip)
    draw.rounded_rectangle((0, 0, chip.width - 1, line - 1), pad, VERDICT_COLOURS[row.verdict])
    draw.text((pad, line // 2), str(row.verdict), ink_on(row.verdict), font_of(size), anchor="lm")
    words, reason = (row.effect, row.reason) if row.effect else (row.reason, "")
    lines = [
        joined([chip, line_of(row.title, width - chip.width - pad, size, smallest=0.55)], pad),
        line_of(words if step is None else f"{words}, step {step}", width, size),
        line_of(reason, width, SMALLEST * size, QUIET),
        Image.new("RGB", (width, pad), PAPER),
    ]
    return joined(lines, down=True)


def ink_on(verdict: Verdict) -> str:
    """What can be read on a verdict's colour."""
    return "#FFFFFF" if verdict is Verdict.INCONCLUSIVE else "#000000"


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def colours(values: np.ndarray) -> np.ndarray:
    """RGB uint8 ``(h, w, 3)`` of ``values`` ``(h, w)``: 0 is nothing and 1 the top of the scale; clipped outside."""
    position = np.clip(values, 0, 1) * (len(STOPS) - 1)
    channels = [np.interp(position, np.arange(len(STOPS)), STOPS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def scaled(log_values: np.ndarray) -> np.ndarray:
    """Log ratios on the scale [0, 1]: a factor of 1 or less is 0, one of ``MAX_FACTOR`` or more is 1, NaN is 0."""
    return np.asarray(np.clip(np.nan_to_num(log_values, nan=0.0) / np.log(MAX_FACTOR), 0, 1))


def opacity(share: np.ndarray) -> np.ndarray:
    """How opaque the heatmap lies on the image where it has these values of the scale, uint8."""
    return np.asarray((np.sqrt(share) * 0.85 * 255).round(), np.uint8)


def overlay(image: np.ndarray, log_values: np.ndarray, regions: Sequence[Region] = (), *, side: int = SHOWN) -> Picture:
    """The image, ``fitted`` into a square of ``side`` pixels, under its heatmap with region boxes.

    The higher a value, the more opaque the heatmap: where nothing was stored, the image shows unchanged.

    Args:
        image: RGB uint8 ``(H, W, 3)``; the boxes of ``regions`` are in its pixels.
        log_values: natural log of reduction factors, ``(h, w)``; enlarged to the image without smoothing.
    """
    plain, share = fitted(image, side, side), scaled(log_values)
    small = colours(share), opacity(share)
    heat, mask = (Image.fromarray(part).resize(plain.size, Image.Resampling.NEAREST) for part in small)
    marked = Image.composite(heat, plain, mask)
    draw, font, zoom = ImageDraw.Draw(marked), font_of(max(18, side // 18)), plain.width / image.shape[1]
    for region in regions:
        left, top, right, bottom = (round(edge * zoom) for edge in region.box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline="#FFFFFF", width=2)
        text = f"{math.exp(region.effect):.1f}x"
        draw.text((left + 5, top + 3), text, fill="#FFFFFF", font=font, stroke_width=2, stroke_fill="#000000")
    return marked


def colour_bar(height: int, size: int = 20) -> Picture:
    """The vertical scale of reduction factors, labelled at 1x, 2x and at the top in letters of ``size`` pixels."""
    bar, length = Image.new("RGB", (BAR, height), PAPER), height - 2 * PAD
    bar.paste(Image.fromarray(colours(np.linspace(1, 0, length)[:, None].repeat(18, 1))), (6, PAD))
    draw = ImageDraw.Draw(bar)
    for tick in (1.0, 2.0, MAX_FACTOR):
        y = PAD + (length - 1) * (1 - math.log(tick) / math.log(MAX_FACTOR))
        draw.line((24, y, 28, y), fill=INK)
        draw.text((31, y), f"{tick:g}x", fill=INK, font=font_of(size), anchor="lm")
    return bar
