"""Heatmaps: from numbers to pictures, on a colour scale that means the same in every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memwatch.config import MemWatchConfig
from memwatch.judge.findings import Finding
from memwatch.judge.regions import Region
from memwatch.measure.copies import Proof

# Nine stops from black over red to pale yellow, rising in lightness: readable in grey and by colour-blind people.
STOPS = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 230, 120),
        (252, 255, 164),
    ],
    dtype=np.float64,
)
SHOWN = 384  # pixels; smaller pictures are enlarged until boxes and text can be read
FRAME = (230, 60, 50)  # of a generation that is a copy
BAR = 74  # pixels, width of the colour bar with its labels


def colours(values: np.ndarray) -> np.ndarray:
    """The colours of ``values``, RGB uint8 ``(h, w, 3)``.

    Args:
        values: ``(h, w)``; 0 is nothing and 1 the top of the scale. Values outside are clipped.
    """
    position = np.clip(values, 0, 1) * (len(STOPS) - 1)
    channels = [np.interp(position, np.arange(len(STOPS)), STOPS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def scaled(log_values: np.ndarray, max_factor: float) -> np.ndarray:
    """Log ratios on the scale [0, 1]: a factor of 1 or less is 0, one of ``max_factor`` or more is 1, NaN is 0."""
    share: np.ndarray = np.clip(np.nan_to_num(log_values, nan=0.0) / np.log(max_factor), 0, 1)
    return share


def pictures_of(findings: Sequence[Finding], config: MemWatchConfig) -> dict[str, Image.Image]:
    """The picture of every finding that has an image, by the probe's name."""
    pictures = {f.name: picture_of(f, config.heatmap.max_factor) for f in findings}
    return {name: picture for name, picture in pictures.items() if picture is not None}


def picture_of(finding: Finding, max_factor: float) -> Image.Image | None:
    """The probe's image beside its heatmap, and its generations; ``None`` where there is no image. See ``overlay``."""
    image, signals = finding.observation.image, finding.signals
    if image is None:
        return None
    if signals is None or signals.decisive is None:
        return overlay(image, np.zeros(image.shape[:2]), max_factor=max_factor)
    picture = overlay(image, signals.decisive.mean.numpy(), finding.regions, max_factor=max_factor)
    return picture if finding.proof is None else with_generations(picture, finding.proof)


def overlay(
    image: np.ndarray, log_values: np.ndarray, regions: Sequence[Region] = (), *, max_factor: float = 8.0
) -> Image.Image:
    """Three things side by side: the image, the image under its heatmap with region boxes, and the colour bar.

    The higher a value, the more opaque the heatmap: where nothing was stored, the image shows unchanged.

    Args:
        image: RGB uint8 ``(H, W, 3)``.
        log_values: natural log of reduction factors, ``(h, w)``; enlarged to the image without smoothing.
        regions: their boxes are in pixels of ``image``.
        max_factor: the reduction factor at the top of the scale.
    """
    height, width = image.shape[:2]
    zoom = max(1, -(-SHOWN // max(height, width)))
    size = (width * zoom, height * zoom)
    plain = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
    share = np.asarray(
        Image.fromarray(scaled(log_values, max_factor).astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    )
    opacity = np.sqrt(share)[..., None] * 0.85
    mixed = np.asarray(plain) * (1 - opacity) + colours(share) * opacity
    marked = Image.fromarray(mixed.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(marked), ImageFont.load_default(max(11, size[1] // 28))
    for region in regions:
        left, top, right, bottom = (edge * zoom for edge in region.box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255), width=2)
        text = f"{np.exp(region.mean):.1f}x"
        draw.text((left + 4, top + 2), text, fill=(255, 255, 255), font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    picture = Image.new("RGB", (2 * size[0] + BAR + 8, size[1]), (255, 255, 255))
    picture.paste(plain, (0, 0))
    picture.paste(marked, (size[0] + 4, 0))
    picture.paste(colour_bar(size[1], max_factor), (2 * size[0] + 8, 0))
    return picture


def with_generations(picture: Image.Image, proof: Proof) -> Image.Image:
    """The picture, and on its right all generations in a square; those that copy the region are framed."""
    side, rows = picture.height, math.ceil(math.sqrt(len(proof.generations)))
    cell, first = side // rows, picture.width + 4
    wide = Image.new("RGB", (first + cell * rows, side), (255, 255, 255))
    wide.paste(picture, (0, 0))
    draw = ImageDraw.Draw(wide)
    for i, (generation, is_copy) in enumerate(zip(proof.generations, proof.is_copy, strict=True)):
        left, top = first + cell * (i % rows), cell * (i // rows)
        small = Image.fromarray(generation).resize((cell - 4, cell - 4), Image.Resampling.BICUBIC)
        wide.paste(small, (left + 2, top + 2))
        if is_copy:
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=FRAME, width=3)
    return wide


def colour_bar(height: int, max_factor: float) -> Image.Image:
    """The vertical scale of reduction factors, labelled at 1x, 2x, 4x ... and at the top."""
    bar = Image.new("RGB", (BAR, height), (255, 255, 255))
    pad = 14
    column = colours(np.linspace(1, 0, height - 2 * pad)[:, None].repeat(18, 1))
    bar.paste(Image.fromarray(column), (6, pad))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(13)
    ticks = [*(2.0**i for i in range(int(np.log2(max_factor - 1e-9)) + 1)), max_factor]
    for tick in ticks:
        y = pad + (height - 2 * pad - 1) * (1 - np.log(tick) / np.log(max_factor))
        draw.line((24, y, 28, y), fill=(0, 0, 0))
        draw.text((31, y - 8), f"{tick:g}x", fill=(0, 0, 0), font=font)
    return bar


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Several pictures of one size on one sheet, row by row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) - 6, rows * (height + 6) - 6), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + 6), (i // columns) * (height + 6)))
    return sheet
