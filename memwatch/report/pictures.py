"""Pictures of an event: one per probe, panels under a title bar, and the overview with a card per probe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from memwatch.judge.copied import Proof
from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.report.drawing import (
    BAR,
    PAPER,
    QUIET,
    SHOWN,
    VERDICT_COLOURS,
    Picture,
    colour_bar,
    fitted,
    fitting,
    font_of,
    ink_on,
    joined,
    line_of,
    overlay,
    paragraph,
    placed,
    title_bar,
)
from memwatch.report.report import Report

MARGIN = 8  # pixels around and between panels
BOTH = 2 * SHOWN + MARGIN  # pixels, width of a row
TITLE = (BOTH + 2 * MARGIN + BAR) // 21  # letters of 12 pixels where a dashboard shows the picture 250 pixels wide
CAPTION, LETTERS = 33, 22  # pixels: a caption's height, and the size of its letters
COPY = VERDICT_COLOURS[Verdict.MEMORIZED]  # frames a generation that copies the region

WIDTH = 1600  # pixels, of the overview
EDGE = 24  # pixels, around everything there and between cards
GRID = WIDTH - BAR - 3 * EDGE  # pixels, width of all cards
CARDS = 12  # at most
HEADLINE, TEXT, CARD_TITLE = 72, 34, 30  # pixels: letters
HEATMAP = (
    "The second picture of a card is the heatmap: the brighter, the more the model's error there has fallen, both "
    "since before training and because of the prompt. White boxes show where it stands out."
)
GENERATED = "The third picture is the nearest of those that the model now generates from the caption."

Panel = tuple[Picture, str]  # with its caption


# --- one probe --------------------------------------------------------------------------------------------------------


def picture_of(report: Report, finding: Finding) -> Picture:
    """The title bar, the image beside its heatmap and, where there is a region, a second row.

    The first row lies at the same place at every step. The second one has what the caption generates now, if that was
    tried, and the region enlarged.
    """
    rows = [row_of(first_panels(finding))]
    bar = colour_bar(max(SHOWN // 2, rows[0].height - CAPTION))
    if finding.regions:
        panels = region_panels(finding)
        rows.append(row_of(panels, SHOWN if len(panels) == 2 else BOTH))
    title = title_bar(report.rows[finding.name], BOTH + BAR, TITLE, report.step)
    content = joined([title, joined([joined(rows, down=True), bar], MARGIN)], MARGIN, down=True)
    return placed(content, content.width + MARGIN, content.height + MARGIN, (MARGIN, MARGIN))


def row_of(panels: Sequence[Panel], width: int = SHOWN) -> Picture:
    """Panels side by side, each ``width`` pixels wide, with its caption below."""
    height, tiles = max(shown.height for shown, _ in panels), []
    for shown, caption in panels:
        tile = joined([placed(shown, width, height), Image.new("RGB", (width, CAPTION), PAPER)], down=True)
        text, font = fitting(caption, width, LETTERS)
        ImageDraw.Draw(tile).text((width / 2, height + CAPTION / 2), text, QUIET, font, anchor="mm")
        tiles.append(tile)
    return joined(tiles, MARGIN)


def image_of(finding: Finding) -> np.ndarray:
    """The image of a finding that has one, RGB uint8 ``(H, W, 3)``."""
    assert finding.observation.image is not None
    return finding.observation.image


def first_panels(finding: Finding, side: int = SHOWN) -> list[Panel]:
    """The image that was measured, and the same under its heatmap; the caption tells how coarse that is."""
    image, is_reference = image_of(finding), finding.observation.probe.is_reference
    plain = fitted(image, side, side), "training image" if is_reference else "generated from prompt"
    if finding.signals is None or finding.signals.heatmap is None:
        return [plain, (plain[0], "no heatmap")]
    values = finding.signals.heatmap.mean.numpy()
    marked = overlay(image, values, finding.regions, side=side)
    return [plain, (marked, f"heatmap, {values.shape[1]}x{values.shape[0]} latent pixels")]


def region_panels(finding: Finding) -> list[Panel]:
    """The second row, see ``picture_of``."""
    image, proof, box = image_of(finding), finding.proof, finding.regions[0].box
    heat = image
    if finding.signals is not None and finding.signals.heatmap is not None:
        side = min(max(image.shape), 2 * SHOWN)  # a large one no larger than its parts are shown
        heat = np.asarray(overlay(image, finding.signals.heatmap.mean.numpy(), side=side))
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
        tile = placed(fitted(generation, cell - 8, cell - 8), cell, cell)
        if is_copy:
            draw, ink = ImageDraw.Draw(tile), ink_on(Verdict.MEMORIZED)
            draw.rectangle((0, 0, cell - 1, cell - 1), outline=COPY, width=5)
            draw.rectangle((0, 0, 3 * letters, letters + 6), COPY)
            draw.text((1.5 * letters, letters / 2 + 3), "copy", ink, font_of(letters), anchor="mm")
        sheet.paste(tile, (cell * (i % rows), cell * (i // rows)))
    return sheet


def pair(one: np.ndarray, other: np.ndarray, width: int = SHOWN, height: int = SHOWN) -> Picture:
    """Two RGB uint8 pictures of one shape, side by side or one above the other: whichever shows them larger."""
    sizes = [((width - MARGIN) // 2, height), (width, (height - MARGIN) // 2)]
    size = max(sizes, key=lambda each: min(each[0] / one.shape[1], each[1] / one.shape[0]))
    return joined([fitted(one, *size), fitted(other, *size)], MARGIN, down=size[0] == width)


# --- the whole event --------------------------------------------------------------------------------------------------


def overview_of(report: Report) -> Picture | None:
    """A title, a card per probe, which probes have no card, and how to read it; ``None`` for an event that failed."""
    if not report.findings:
        return None
    by_name = {f.name: f for f in report.findings}
    shown = [by_name[row.name] for row in report.event.worst_first[:CARDS]]
    panels = 3 if any(f.proof is not None for f in shown) else 2
    columns = min(len(shown), 5 - panels)
    cards = [card(report, f, (GRID - (columns - 1) * EDGE) // columns, panels) for f in shown]
    rows = [joined(cards[i : i + columns], EDGE) for i in range(0, len(cards), columns)]
    notes = [report.event.left_out(CARDS)]
    notes += [HEATMAP] if any(f.observation.image is not None for f in shown) else []
    notes += [GENERATED] if panels == 3 else []
    body = joined([*rows, *(paragraph(note, GRID, LETTERS) for note in notes if note)], EDGE, down=True)
    bar = colour_bar(max(SHOWN, rows[0].height), LETTERS)
    planned, width = report.config.max_train_steps, WIDTH - 2 * EDGE
    title = f"Step {report.step}{f' of {planned}' if planned else ''}: {report.event.counts()}"
    head = joined([line_of(title, width, HEADLINE), paragraph(measure(report), width, TEXT)], down=True)
    content = joined([head, joined([body, bar], EDGE)], EDGE, down=True)
    return placed(content, WIDTH, content.height + 2 * EDGE, (EDGE, EDGE))


def measure(report: Report) -> str:
    """Whether training stops, what the controls show, and what it takes to be called memorized."""
    stop = "memwatch stopped the training. " if report.stop_reason is not None else ""
    if controls := report.controls:
        held_out = f"{len(controls)} held-out control{'s' if len(controls) != 1 else ''}"
        reached = f"{held_out} reach{'es' if len(controls) == 1 else ''} {max(controls.values()):.1f}x at most"
        return f"{stop}{reached}; {report.event.calibration}."
    if report.calibrated:
        return f"{stop}The controls were not compared with anything at this event."
    return f"{stop}There are no controls, so a probe can be called suspicious, but never memorized."


def card(report: Report, finding: Finding, width: int, panels: int) -> Picture:
    """A probe's title bar and, where it has an image, its panels; ``panels``: into how many the width is shared."""
    row, proof = report.rows[finding.name], finding.proof
    title = title_bar(row, width, CARD_TITLE)
    if finding.observation.image is None:
        return title
    side = (width - (panels - 1) * MARGIN) // panels
    shown = [(tile, caption.partition(",")[0]) for tile, caption in first_panels(finding, side)]  # all is too long
    if proof is not None:
        shown.append((fitted(proof.generations[nearest_of(proof) or 0], side, side), row.proof(brief=True)))
    return joined([title, row_of(shown, side)], down=True)
