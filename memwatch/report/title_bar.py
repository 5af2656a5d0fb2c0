"""The title that every picture carries, so that it says what it shows wherever it is seen."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict
from memwatch.report.history import effect_of

VERDICT_COLOURS = {  # of Okabe and Ito's palette, and a grey: colour-blind people tell them apart
    Verdict.MEMORIZED: "#D55E00",
    Verdict.SUSPICIOUS: "#E69F00",
    Verdict.NO_EVIDENCE: "#009E73",
    Verdict.INCONCLUSIVE: "#6E6E6E",
}
PAPER, INK, QUIET = "#FFFFFF", "#141414", "#555555"
LEADING = 1.4  # of the size of the letters: from line to line
SMALLEST = 0.7  # of the size asked for, to which letters shrink before a text is cut

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def title_bar(finding: Finding, width: int, size: int, step: int | None = None) -> Image.Image:
    """Three lines: the verdict on its colour and the probe's title; the effect and p-value; the reason.

    Where no judgement was possible, the second line holds the reason and the third one is empty.

    Args:
        width: pixels.
        size: of the letters, pixels.
        step: left out where the picture around it says so.
    """
    line, small, pad = round(size * LEADING), round(SMALLEST * size * LEADING), size // 3
    picture = Image.new("RGB", (width, 2 * line + small + pad), PAPER)
    right = draw_chip(picture, finding.verdict, (0, 0), size) + pad
    draw = ImageDraw.Draw(picture)
    text, font = fitting(finding.observation.probe.title, width - right, size, smallest=0.55)
    draw.text((right, line // 2), text, INK, font, anchor="lm")
    effect = effect_of(finding)
    words, reason = (effect, finding.reason) if effect else (finding.reason, "")
    text, font = fitting(words if step is None else f"{words}, step {step}", width, size)
    draw.text((0, line + line // 2), text, INK, font, anchor="lm")
    text, font = fitting(reason, width, round(SMALLEST * size))
    draw.text((0, 2 * line + small // 2), text, QUIET, font, anchor="lm")
    return picture


def draw_chip(picture: Image.Image, verdict: Verdict, at: tuple[int, int], size: int) -> int:
    """Write a verdict on its colour; where the chip ends, in pixels from the left."""
    draw, line, pad = ImageDraw.Draw(picture), round(size * LEADING), size // 3
    left, top = at
    right = left + round(font_of(size).getlength(verdict)) + 2 * pad
    draw.rounded_rectangle((left, top, right, top + line - 1), pad, VERDICT_COLOURS[verdict])
    draw.text((left + pad, top + line // 2), str(verdict), ink_on(verdict), font_of(size), anchor="lm")
    return right


def ink_on(verdict: Verdict) -> str:
    """What can be read on a verdict's colour."""
    return "#FFFFFF" if verdict is Verdict.INCONCLUSIVE else "#000000"


@cache
def font_of(size: int) -> Font:
    """Pillow's own font, which every machine has; ``size`` in pixels."""
    return ImageFont.load_default(size)


def fitting(text: str, width: float, size: int, smallest: float = SMALLEST) -> tuple[str, Font]:
    """The text and a font in which it fits into ``width``: the letters shrink a little, then the middle is cut out."""
    for smaller in range(size, round(smallest * size), -1):
        if font_of(smaller).getlength(text) <= width:
            return text, font_of(smaller)
    font, kept = font_of(round(smallest * size)), len(text)
    cut = text
    while kept > 1 and font.getlength(cut) > width:
        kept -= 1
        cut = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    return cut, font


def wrapped(text: str, width: float, size: int) -> list[str]:
    """The lines of a text that is broken between words."""
    font, lines = font_of(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
