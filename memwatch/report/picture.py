"""One probe at one event: panels under a title bar that says what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.measure.copies import Proof
from memwatch.report.heatmap import BAR, colour_bar, overlay
from memwatch.report.report import Report
from memwatch.report.tiles import (
    PAPER,
    QUIET,
    SHOWN,
    VERDICT_COLOURS,
    Picture,
    centred,
    fitted,
    fitting,
    font_of,
    ink_on,
    joined,
    title_bar,
)

MARGIN = 8  # pixels around and between panels
BOTH = 2 * SHOWN + MARGIN  # pixels, width of a row
WIDTH = BOTH + 2 * MARGIN + BAR
TITLE = WIDTH // 21  # pixels: letters of 12 pixels where a dashboard shows the picture 250 pixels wide
CAPTION, LETTERS = 33, 22  # pixels: a caption's height, and its letters
COPY = VERDICT_COLOURS[Verdict.MEMORIZED]  # frames a generation that copies the region

Panel = tuple[Picture, str]  # with its caption


def pictures_of(report: Report) -> dict[str, Picture]:
    """The picture of every finding that has an image, by the probe's name."""
    return {f.name: picture_of(report, f) for f in report.findings if f.observation.image is not None}


def picture_of(report: Report, finding: Finding) -> Picture:
    """The title bar, the image beside its heatmap and, where there is a region, a second row.

    The first row lies at the same place at every step. The second one holds what the caption generates now and the
    region enlarged or, where nothing was generated, the region and its heatmap enlarged.
    """
    first = row_of([image_panel(finding), heat_panel(finding)])
    panels = region_panels(finding) if finding.regions else []
    rows = [first, row_of(panels, SHOWN if len(panels) == 2 else BOTH)] if panels else [first]
    title = title_bar(report.rows[finding.name], WIDTH - 2 * MARGIN, TITLE, report.step)
    body = joined([joined(rows, down=True), colour_bar(max(SHOWN // 2, first.height - CAPTION))], MARGIN)
    content = joined([title, body], MARGIN, down=True)
    picture = Image.new("RGB", (WIDTH, content.height + MARGIN), PAPER)
    picture.paste(content, (MARGIN, MARGIN))
    return picture


def row_of(panels: Sequence[Panel], width: int = SHOWN) -> Picture:
    """Panels side by side, each ``width`` pixels wide, with its caption below."""
    height, tiles = max(shown.height for shown, _ in panels), []
    for shown, caption in panels:
        tile = Image.new("RGB", (width, height + CAPTION), PAPER)
        tile.paste(centred(shown, width, height), (0, 0))
        text, font = fitting(caption, width, LETTERS)
        ImageDraw.Draw(tile).text((width / 2, height + CAPTION / 2), text, QUIET, font, anchor="mm")
        tiles.append(tile)
    return joined(tiles, MARGIN)


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
    """The image of a finding that has one, RGB uint8 ``(H, W, 3)``."""
    assert finding.observation.image is not None
    return finding.observation.image


def region_panels(finding: Finding) -> list[Panel]:
    """The second row, see ``picture_of``."""
    image, proof, box = image_of(finding), finding.proof, finding.regions[0].box
    heat = image
    if finding.signals is not None and finding.signals.decisive is not None:
        side = min(max(image.shape), 2 * SHOWN)  # a large one no larger than its parts are shown
        heat = np.asarray(overlay(image, finding.signals.decisive.mean.numpy(), side=side))
    own, other, what = cropped(image, box, image.shape), cropped(heat, box, image.shape), "heatmap"
    if proof is None:
        return [(pair(own, other, BOTH), "the region enlarged: image | heatmap")]
    count, nearest = len(proof.generations), nearest_of(proof)
    said = f"generated now: {count}, a copy cannot be told"
    if nearest is not None:
        other, what = cropped(proof.generations[nearest], box, image.shape), "nearest generation"
        found = f"{'copies' if proof.copied == 1 else 'copy'} the region"
        is_reference = finding.observation.probe.is_reference
        said = f"generated now: {proof.copied} of {count} {found if is_reference else 'are alike there'}"
    return [(generations(proof), said), (pair(own, other), f"enlarged: image | {what}")]


def cropped(picture: np.ndarray, box: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The part of an RGB uint8 picture that lies where ``box`` lies in an image of this ``shape``."""
    high, wide = picture.shape[0] / shape[0], picture.shape[1] / shape[1]
    left, top, right, bottom = box
    return picture[round(top * high) : round(bottom * high), round(left * wide) : round(right * wide)]


def nearest_of(proof: Proof) -> int | None:
    """Which generation is nearest to the probe; ``None`` where that cannot be told."""
    best = int(np.argmin(proof.ratios))
    return best if math.isfinite(proof.ratios[best]) else None


def generations(proof: Proof, side: int = SHOWN) -> Picture:
    """All generations in a square; those that copy the region are framed and say so."""
    rows = math.ceil(math.sqrt(len(proof.generations)))
    cell, letters = side // rows, max(12, side // 20)
    sheet = Image.new("RGB", (side, side), PAPER)
    for i, (generation, is_copy) in enumerate(zip(proof.generations, proof.is_copy, strict=True)):
        tile = centred(fitted(generation, cell - 8, cell - 8), cell, cell)
        if is_copy:
            draw, ink = ImageDraw.Draw(tile), ink_on(Verdict.MEMORIZED)
            draw.rectangle((0, 0, cell - 1, cell - 1), outline=COPY, width=5)
            draw.rectangle((0, 0, 3 * letters, letters + 6), COPY)
            draw.text((1.5 * letters, letters / 2 + 3), "copy", ink, font_of(letters), anchor="mm")
        sheet.paste(tile, (cell * (i % rows), cell * (i // rows)))
    return sheet


def pair(one: np.ndarray, other: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Picture:
    """Two RGB uint8 pictures of one shape in ``width`` x ``height``, side by side or one above the other.

    Whichever shows them larger.
    """
    sizes = [((width - MARGIN) // 2, height), (width, (height - MARGIN) // 2)]
    size = max(sizes, key=lambda each: min(each[0] / one.shape[1], each[1] / one.shape[0]))
    return joined([fitted(one, *size), fitted(other, *size)], MARGIN, down=size[0] == width)
