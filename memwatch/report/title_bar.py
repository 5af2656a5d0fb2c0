"""Strip: the title that every picture carries, so that it says what it shows wherever it is seen."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

from memwatch.judge.findings import Finding
from memwatch.judge.verdict import Verdict

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


def strip(finding: Finding, width: int, size: int, step: int | None = None) -> Image.Image:
    """Two lines: the verdict on its colour and the probe's name; how much freedom is lost, how unlikely that is, when.

    Args:
        width: pixels.
        size: of the letters, pixels.
        step: left out where the picture around it says so.
    """
    line, pad = round(size * LEADING), size // 3
    picture = Image.new("RGB", (width, 2 * line + pad), PAPER)
    right = draw_chip(picture, finding.verdict, (0, 0), size) + pad
    draw = ImageDraw.Draw(picture)
    text, font = fitting(finding.name, width - right, size)
    draw.text((right, line // 2), text, INK, font, anchor="lm")
    words = in_words(finding) if step is None else f"{in_words(finding)}, step {step}"
    text, font = fitting(words, width, size)
    draw.text((0, line + line // 2), text, INK, font, anchor="lm")
    return picture


def in_words(finding: Finding) -> str:
    """The effect and its p-value, or what stands in the way of them, in a few words."""
    evidence = finding.evidence
    if not evidence.finite:
        return "the output is not finite"
    if not evidence.compared:
        return "nothing earlier to compare with"
    effect = f"{evidence.severity:.1f}x less freedom" if evidence.severity >= 1.05 else "no less freedom"
    if evidence.p is not None:
        return f"{effect}, p = {evidence.p:.1g}"
    return f"{effect}, {'too few' if evidence.any_controls else 'no'} controls"


def draw_chip(picture: Image.Image, verdict: Verdict, at: tuple[int, int], size: int) -> int:
    """Write a verdict on its colour; where the chip ends, in pixels from the left."""
    draw, line, pad = ImageDraw.Draw(picture), round(size * LEADING), size // 3
    (left, top), colour = at, VERDICT_COLOURS[verdict]
    right = left + round(font_of(size).getlength(verdict)) + 2 * pad
    draw.rounded_rectangle((left, top, right, top + line - 1), pad, colour)
    draw.text((left + pad, top + line // 2), str(verdict), ink_on(colour), font_of(size), anchor="lm")
    return right


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    return max(("#000000", "#FFFFFF"), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        shares = [channel / 255 for channel in ImageColor.getrgb(colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@cache
def font_of(size: int) -> Font:
    """Pillow's own font, which every machine has; ``size`` in pixels."""
    return ImageFont.load_default(size)


def fitting(text: str, width: float, size: int) -> tuple[str, Font]:
    """The text and a font in which it fits into ``width``: the letters shrink a little, then the middle is cut out."""
    for smaller in range(size, round(SMALLEST * size), -1):
        if font_of(smaller).getlength(text) <= width:
            return text, font_of(smaller)
    font, kept = font_of(round(SMALLEST * size)), len(text)
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
