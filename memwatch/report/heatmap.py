"""Heatmaps: from numbers to pictures, on a colour scale that means the same in every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from memwatch.judge.regions import Region
from memwatch.report.title_bar import INK, PAPER, font_of

# Nine stops from black over red to pale yellow, rising in lightness: readable in grey and by colour-blind people.
COLOURS = "000004 280B54 65156E 9F2A63 D44842 F57D15 FAC127 FCE678 FCFFA4"
STOPS = np.array([list(bytes.fromhex(colour)) for colour in COLOURS.split()], dtype=np.float64)
MAX_FACTOR = 6.0  # at the top of the scale, the same in every picture
BAR = 74  # pixels, width of the colour bar with its labels
SHOWN = 384  # pixels: the longer side of a panel


def colours(values: np.ndarray) -> np.ndarray:
    """The colours of ``values``, RGB uint8 ``(h, w, 3)``.

    Args:
        values: ``(h, w)``; 0 is nothing and 1 the top of the scale. Values outside are clipped.
    """
    position = np.clip(values, 0, 1) * (len(STOPS) - 1)
    channels = [np.interp(position, np.arange(len(STOPS)), STOPS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def scaled(log_values: np.ndarray) -> np.ndarray:
    """Log ratios on the scale [0, 1]: a factor of 1 or less is 0, one of ``MAX_FACTOR`` or more is 1, NaN is 0."""
    share: np.ndarray = np.clip(np.nan_to_num(log_values, nan=0.0) / np.log(MAX_FACTOR), 0, 1)
    return share


def fitted(image: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Image.Image:
    """An image, RGB uint8 ``(H, W, 3)``, as large as fits into ``width`` x ``height``; its own pixels stay visible."""
    zoom = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom)))
    how = Image.Resampling.NEAREST if zoom >= 2 else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, how)


def overlay(
    image: np.ndarray, log_values: np.ndarray, regions: Sequence[Region] = (), *, side: int = SHOWN
) -> Image.Image:
    """The image, ``fitted`` into a square, under its heatmap with region boxes.

    The higher a value, the more opaque the heatmap: where nothing was stored, the image shows unchanged.

    Args:
        image: RGB uint8 ``(H, W, 3)``.
        log_values: natural log of reduction factors, ``(h, w)``; enlarged to the image without smoothing.
        regions: their boxes are in pixels of ``image``.
        side: pixels of the square.
    """
    plain = fitted(image, side, side)
    share = scaled(log_values)
    small = colours(share), (np.sqrt(share) * 0.85 * 255).round().astype(np.uint8)  # heat, and how opaque it is
    heat, opacity = (Image.fromarray(part).resize(plain.size, Image.Resampling.NEAREST) for part in small)
    marked = Image.composite(heat, plain, opacity)
    draw, font, zoom = ImageDraw.Draw(marked), font_of(max(18, side // 18)), plain.width / image.shape[1]
    for region in regions:
        left, top, right, bottom = (round(edge * zoom) for edge in region.box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline="#FFFFFF", width=2)
        text = f"{math.exp(region.effect):.1f}x"
        draw.text((left + 5, top + 3), text, fill="#FFFFFF", font=font, stroke_width=2, stroke_fill="#000000")
    return marked


def height_of(factor: float, height: int, pad: int = 14) -> float:
    """How far below the top of a ``colour_bar`` a factor lies, pixels; outside its scale, at its end."""
    share = min(1.0, max(0.0, math.log(factor) / math.log(MAX_FACTOR)))
    return pad + (height - 2 * pad - 1) * (1 - share)


def colour_bar(height: int, size: int = 20) -> Image.Image:
    """The vertical scale of reduction factors, labelled at 1x, 2x, 4x and at the top.

    Args:
        size: of the labels' letters, pixels.
    """
    bar = Image.new("RGB", (BAR, height), PAPER)
    column = colours(np.linspace(1, 0, height - 2 * 14)[:, None].repeat(18, 1))
    bar.paste(Image.fromarray(column), (6, 14))
    draw = ImageDraw.Draw(bar)
    for tick in (1.0, 2.0, 4.0, MAX_FACTOR):
        y = height_of(tick, height)
        draw.line((24, y, 28, y), fill=INK)
        draw.text((31, y), f"{tick:g}x", fill=INK, font=font_of(size), anchor="lm")
    return bar
