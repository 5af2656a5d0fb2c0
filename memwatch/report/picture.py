"""One probe at one event: panels under a title bar that says what they show."""

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
from memwatch.report.title_bar import PAPER, QUIET, VERDICT_COLOURS, fitting, font_of, ink_on, title_bar

MARGIN = 8  # pixels around and between panels
BOTH = 2 * SHOWN + MARGIN  # pixels, width of a row
WIDTH = BOTH + 2 * MARGIN + BAR
TITLE = WIDTH // 21  # pixels: letters of 12 pixels where a dashboard shows the picture 250 pixels wide
LETTERS, LINE = 22, 1.5  # of captions: pixels, and how many of that their line is high
COPY = VERDICT_COLOURS[Verdict.MEMORIZED]  # frames a generation that copies the region

Panel = tuple[Image.Image, str]  # with its caption


def pictures_of(report: Report) -> dict[str, Image.Image]:
    """The picture of every finding that has an image, by the probe's name."""
    return {f.name: picture_of(f, report.step) for f in report.findings if f.observation.image is not None}


def picture_of(finding: Finding, step: int) -> Image.Image:
    """The title bar, the image beside its heatmap and, where there is a region, a second row.

    The first row lies at the same place at every step. The second one holds what the caption generates now and the
    region enlarged or, where nothing was generated, the region and its heatmap enlarged.
    """
    rows = [row_of(centred(image_panel(finding)), centred(heat_panel(finding)))]
    if finding.regions:
        rows.append(row_of(*region_panels(finding)))
    title = title_bar(finding, WIDTH - 2 * MARGIN, TITLE, step)
    top = title.height + 2 * MARGIN
    picture = Image.new("RGB", (WIDTH, top + sum(row.height for row in rows)), PAPER)
    picture.paste(title, (MARGIN, MARGIN))
    picture.paste(colour_bar(max(SHOWN // 2, rows[0].height - round(LINE * LETTERS))), (WIDTH - BAR, top))
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
    """Panels side by side, each with its caption below; ``letters``: size of the captions, pixels."""
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
    """The image that was measured."""
    is_reference = finding.observation.probe.is_reference
    return fitted(image_of(finding), side, side), "training image" if is_reference else "generated from prompt"


def heat_panel(finding: Finding, side: int = SHOWN) -> Panel:
    """The image under its heatmap; the caption tells how coarse that is."""
    image, signals = image_of(finding), finding.signals
    if signals is None or signals.decisive is None:
        return fitted(image, side, side), "no heatmap"
    values = signals.decisive.mean.numpy()
    marked = overlay(image, values, finding.regions, side=side)
    return marked, f"heatmap, {values.shape[1]}x{values.shape[0]} latent pixels"


def image_of(finding: Finding) -> np.ndarray:
    """Its image, RGB uint8 ``(H, W, 3)``. Raises a ``ValueError`` where it has none."""
    if finding.observation.image is None:
        raise ValueError(f"got {finding.name}, which has no image; allowed: a finding with one")
    return finding.observation.image


def region_panels(finding: Finding) -> list[Panel]:
    """The second row, see ``picture_of``."""
    image, proof, box = image_of(finding), finding.proof, finding.regions[0].box
    heat = image
    if finding.signals is not None and finding.signals.decisive is not None:
        side = min(max(image.shape), 2 * SHOWN)  # a large one no larger than its parts are shown
        heat = np.asarray(overlay(image, finding.signals.decisive.mean.numpy(), side=side))
    own, beside, what = cropped(image, box, image.shape), cropped(heat, box, image.shape), "heatmap"
    if proof is None:
        return [centred((pair(own, beside, BOTH), "the region enlarged: image | heatmap"), BOTH)]
    count, nearest = len(proof.generations), nearest_of(proof)
    said = f"generated now: {count}, a copy cannot be told"
    if nearest is not None:
        beside, what = cropped(proof.generations[nearest], box, image.shape), "nearest generation"
        found = f"{'copies' if proof.copied == 1 else 'copy'} the region"
        is_reference = finding.observation.probe.is_reference
        said = f"generated now: {proof.copied} of {count} {found if is_reference else 'are alike there'}"
    return [(generations(proof), said), centred((pair(own, beside), f"enlarged: image | {what}"))]


def cropped(picture: np.ndarray, box: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The part of an RGB uint8 picture that lies where ``box`` lies in an image of this ``shape``."""
    high, wide = picture.shape[0] / shape[0], picture.shape[1] / shape[1]
    left, top, right, bottom = box
    rows, columns = slice(round(top * high), round(bottom * high)), slice(round(left * wide), round(right * wide))
    return picture[rows, columns]


def nearest_of(proof: Proof) -> int | None:
    """Which generation is nearest to the probe; ``None`` where that cannot be told."""
    best = int(np.argmin(proof.ratios))
    return best if math.isfinite(proof.ratios[best]) else None


def generations(proof: Proof, side: int = SHOWN) -> Image.Image:
    """All generations in a square; those that copy the region are framed and say so."""
    rows = math.ceil(math.sqrt(len(proof.generations)))
    cell, letters = side // rows, max(12, side // 20)
    sheet = Image.new("RGB", (side, side), PAPER)
    draw, ink = ImageDraw.Draw(sheet), ink_on(Verdict.MEMORIZED)
    for i, (generation, is_copy) in enumerate(zip(proof.generations, proof.is_copy, strict=True)):
        left, top = cell * (i % rows), cell * (i // rows)
        small = fitted(generation, cell - 8, cell - 8)
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        if is_copy:
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=COPY, width=5)
            draw.rectangle((left, top, left + 3 * letters, top + letters + 6), COPY)
            draw.text((left + 1.5 * letters, top + letters / 2 + 3), "copy", ink, font_of(letters), anchor="mm")
    return sheet


def pair(one: np.ndarray, other: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Image.Image:
    """Two RGB uint8 pictures of one shape in ``width`` x ``height``: side by side, or one above the other.

    Whichever shows them larger.
    """
    sizes = [((width - MARGIN) // 2, height), (width, (height - MARGIN) // 2)]
    size = max(sizes, key=lambda each: min(each[0] / one.shape[1], each[1] / one.shape[0]))
    first, second = fitted(one, *size), fitted(other, *size)
    at = (0, first.height + MARGIN) if size[0] == width else (first.width + MARGIN, 0)
    both = Image.new("RGB", (max(first.width, at[0] + second.width), at[1] + second.height), PAPER)
    both.paste(first, (0, 0))
    both.paste(second, at)
    return both
