"""Picture: one probe at one event, in panels under a strip that says what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.measure.copies import Proof
from memwatch.report.heatmap import BAR, SHOWN, colour_bar, fitted, overlay
from memwatch.report.report import Report
from memwatch.report.title_bar import PAPER, QUIET, VERDICT_COLOURS, fitting, font_of, ink_on, strip

MARGIN = 8  # pixels around and between panels
BOTH = 2 * SHOWN + MARGIN  # pixels, width of a row
WIDTH = BOTH + 2 * MARGIN + BAR
TITLE = WIDTH // 21  # pixels: letters of 12 pixels where a dashboard shows the picture 250 pixels wide
LETTERS, LINE = 22, 1.5  # of captions: pixels, and how many of that their line is high
COPY = VERDICT_COLOURS[Verdict.MEMORIZED]  # frames a generation that copies the region

Panel = tuple[Image.Image, str]  # with its caption


def pictures_of(report: Report) -> dict[str, Image.Image]:
    """The picture of every finding that has an image, by the probe's name."""
    found = {f.name: picture_of(f, report.step, 6.0) for f in report.findings}
    return {name: picture for name, picture in found.items() if picture is not None}


def picture_of(finding: Finding, step: int, max_factor: float) -> Image.Image | None:
    """The strip, the image beside its heatmap and, where there is a region, a second row; ``None`` without an image.

    The first row lies at the same place at every step. The second one holds what the caption generates now and the
    region enlarged or, where nothing was generated, the region and its heatmap enlarged.

    Args:
        max_factor: the reduction factor at the top of the colour scale.
    """
    if finding.observation.image is None:
        return None
    first = row_of(centred(image_panel(finding)), centred(heat_panel(finding, max_factor)))
    rows = [first, *([row_of(*region_panels(finding, max_factor))] if finding.regions else [])]
    title = strip(finding, WIDTH - 2 * MARGIN, TITLE, step)
    top = title.height + 2 * MARGIN
    picture = Image.new("RGB", (WIDTH, top + sum(row.height for row in rows)), PAPER)
    picture.paste(title, (MARGIN, MARGIN))
    picture.paste(colour_bar(max(SHOWN // 2, first.height - round(LINE * LETTERS)), max_factor), (WIDTH - BAR, top))
    for row in rows:
        picture.paste(row, (MARGIN, top))
        top += row.height
    return picture


def centred(panel: Panel, width: int = SHOWN) -> Panel:
    """The panel with paper on its left and right, ``width`` pixels wide."""
    shown, caption = panel
    whole = Image.new("RGB", (width, shown.height), PAPER)
    whole.paste(shown, ((width - shown.width) // 2, 0))
    return whole, caption


def row_of(*panels: Panel, letters: int = LETTERS) -> Image.Image:
    """Panels side by side, each with its caption below.

    Args:
        letters: size of the captions, pixels.
    """
    width = sum(shown.width + MARGIN for shown, _ in panels) - MARGIN
    height, left = max(shown.height for shown, _ in panels), 0
    row = Image.new("RGB", (width, height + round(LINE * letters)), PAPER)
    for shown, caption in panels:
        row.paste(shown, (left, (height - shown.height) // 2))
        text, font = fitting(caption, shown.width, letters)
        at = (left + shown.width / 2, height + LINE / 2 * letters)
        ImageDraw.Draw(row).text(at, text, QUIET, font, anchor="mm")
        left += shown.width + MARGIN
    return row


def image_panel(finding: Finding, side: int = SHOWN) -> Panel:
    """What was looked at."""
    assert finding.observation.image is not None
    is_reference = finding.observation.probe.is_reference
    return fitted(finding.observation.image, side, side), "training image" if is_reference else "generated from prompt"


def heat_panel(finding: Finding, max_factor: float, side: int = SHOWN) -> Panel:
    """The image under its heatmap; the caption tells how coarse that is."""
    image, signals = finding.observation.image, finding.signals
    assert image is not None
    if signals is None or signals.decisive is None:
        return fitted(image, side, side), "no heatmap"
    values = signals.decisive.mean.numpy()
    marked = overlay(image, values, finding.regions, max_factor=max_factor, side=side)
    return marked, f"heatmap, {values.shape[1]}x{values.shape[0]} latent pixels"


def region_panels(finding: Finding, max_factor: float) -> list[Panel]:
    """The second row, see ``picture_of``."""
    image, proof, box = finding.observation.image, finding.proof, finding.regions[0].box
    assert image is not None
    own, heat = cropped(image, box, image.shape), cropped(heated(finding, max_factor), box, image.shape)
    if proof is None:
        return [centred((pair(own, heat, BOTH), "the region enlarged: image | heatmap"), BOTH)]
    beside, what = heat, "heatmap"
    if (nearest := nearest_of(proof)) is not None:
        beside, what = cropped(proof.generations[nearest], box, image.shape), "nearest generation"
    enlarged = centred((pair(own, beside), f"enlarged: image | {what}"))
    return [(generations(proof), generated_text(finding)), enlarged]


def heated(finding: Finding, max_factor: float) -> np.ndarray:
    """The image under its heatmap, without boxes; a large one no larger than its parts are shown."""
    image, signals = finding.observation.image, finding.signals
    assert image is not None
    if signals is None or signals.decisive is None:
        return image
    side = min(max(image.shape), 2 * SHOWN)
    return np.asarray(overlay(image, signals.decisive.mean.numpy(), max_factor=max_factor, side=side))


def cropped(picture: np.ndarray, box: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The part of an RGB uint8 picture that lies where ``box`` lies in an image of this ``shape``."""
    high, wide = picture.shape[0] / shape[0], picture.shape[1] / shape[1]
    left, top, right, bottom = box
    rows, columns = slice(round(top * high), round(bottom * high)), slice(round(left * wide), round(right * wide))
    return picture[rows, columns]


def nearest_of(proof: Proof) -> int | None:
    """Which generation is nearest to the probe; ``None`` where nobody can tell."""
    best = int(np.argmin(proof.ratios))
    return best if math.isfinite(proof.ratios[best]) else None


def generated_text(finding: Finding) -> str:
    """How many of the generations copy the region."""
    proof = finding.proof
    assert proof is not None
    count = len(proof.generations)
    if nearest_of(proof) is None:
        return f"generated now: {count}, a copy cannot be told"
    verb = "copies" if proof.copied == 1 else "copy"
    what = f"{verb} the region" if finding.observation.probe.is_reference else "are alike there"
    return f"generated now: {proof.copied} of {count} {what}"


def generations(proof: Proof, side: int = SHOWN) -> Image.Image:
    """All generations in a square; those that copy the region are framed and say so."""
    rows = math.ceil(math.sqrt(len(proof.generations)))
    cell, letters = side // rows, max(12, side // 20)
    sheet = Image.new("RGB", (side, side), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (generation, is_copy) in enumerate(zip(proof.generations, proof.is_copy, strict=True)):
        left, top = cell * (i % rows), cell * (i // rows)
        small = fitted(generation, cell - 8, cell - 8)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        if is_copy:
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=COPY, width=5)
            draw.rectangle((left, top, left + 3 * letters, top + letters + 6), COPY)
            draw.text(
                (left + 1.5 * letters, top + letters / 2 + 3), "copy", ink_on(COPY), font_of(letters), anchor="mm"
            )
    return sheet


def pair(one: np.ndarray, other: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Image.Image:
    """Two RGB uint8 pictures of one shape in ``width`` x ``height``: one above the other or side by side.

    Whichever shows them larger.
    """
    shape = one.shape
    zooms = {
        size: min(size[0] / shape[1], size[1] / shape[0])
        for size in (((width - MARGIN) // 2, height), (width, (height - MARGIN) // 2))
    }
    size = max(zooms, key=lambda key: zooms[key])
    first, second = fitted(one, *size), fitted(other, *size)
    at = (0, first.height + MARGIN) if size[0] == width else (first.width + MARGIN, 0)
    ends = max(first.width, at[0] + second.width), max(first.height, at[1] + second.height)
    both = Image.new("RGB", ends, PAPER)
    both.paste(first, (0, 0))
    both.paste(second, at)
    return both
