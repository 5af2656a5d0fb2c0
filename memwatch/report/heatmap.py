"""Heatmaps: from numbers to pictures, on a colour scale that means the same in every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from memwatch.judge.regions import Region
from memwatch.report.tiles import INK, PAPER, SHOWN, fitted, font_of

# Nine stops from black over red to pale yellow, rising in lightness: readable in grey and by colour-blind people.
COLOURS = "000004 280B54 65156E 9F2A63 D44842 F57D15 FAC127 FCE678 FCFFA4"
STOPS = np.array([list(bytes.fromhex(colour)) for colour in COLOURS.split()], dtype=np.float64)
MAX_FACTOR = 6.0  # at the top of the scale, the same in every picture
BAR, PAD = 74, 14  # pixels: width of the colour bar with its labels; paper above and below it


def colours(values: np.ndarray) -> np.ndarray:
    """RGB uint8 ``(h, w, 3)`` of ``values`` ``(h, w)``: 0 is nothing and 1 the top of the scale; clipped outside."""
    position = np.clip(values, 0, 1) * (len(STOPS) - 1)
    channels = [np.interp(position, np.arange(len(STOPS)), STOPS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def scaled(log_values: np.ndarray) -> np.ndarray:
    """Log ratios on the scale [0, 1]: a factor of 1 or less is 0, one of ``MAX_FACTOR`` or more is 1, NaN is 0."""
    share: np.ndarray = np.clip(np.nan_to_num(log_values, nan=0.0) / np.log(MAX_FACTOR), 0, 1)
    return share


def opacity(share: np.ndarray) -> np.ndarray:
    """How opaque the heatmap lies on the image where it has these values of the scale, uint8."""
    return (np.sqrt(share) * 0.85 * 255).round().astype(np.uint8)


def overlay(
    image: np.ndarray, log_values: np.ndarray, regions: Sequence[Region] = (), *, side: int = SHOWN
) -> Image.Image:
    """The image, ``fitted`` into a square, under its heatmap with region boxes.

    The higher a value, the more opaque the heatmap: where nothing was stored, the image shows unchanged.

    Args:
        image: RGB uint8 ``(H, W, 3)``; the boxes of ``regions`` are in its pixels.
        log_values: natural log of reduction factors, ``(h, w)``; enlarged to the image without smoothing.
        side: pixels of the square.
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


def colour_bar(height: int, size: int = 20) -> Image.Image:
    """The vertical scale of reduction factors, labelled at 1x, 2x, 4x and at the top in letters of ``size`` pixels."""
    bar, length = Image.new("RGB", (BAR, height), PAPER), height - 2 * PAD
    bar.paste(Image.fromarray(colours(np.linspace(1, 0, length)[:, None].repeat(18, 1))), (6, PAD))
    draw = ImageDraw.Draw(bar)
    for tick in (1.0, 2.0, 4.0, MAX_FACTOR):
        y = PAD + (length - 1) * (1 - math.log(tick) / math.log(MAX_FACTOR))
        draw.line((24, y, 28, y), fill=INK)
        draw.text((31, y), f"{tick:g}x", fill=INK, font=font_of(size), anchor="lm")
    return bar
