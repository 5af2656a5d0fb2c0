"""One event on one picture: a card per probe, the worst first, under the headline of the event."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from memwatch.judge.findings import Finding
from memwatch.report.heatmap import BAR, SHOWN, colour_bar, fitted
from memwatch.report.history import proof_words
from memwatch.report.picture import MARGIN, centred, heat_panel, image_panel, nearest_of, row_of
from memwatch.report.report import Report, copied_row
from memwatch.report.title_bar import INK, LEADING, PAPER, QUIET, fitting, font_of, title_bar, wrapped

WIDTH = 1600  # pixels
EDGE = 24  # pixels, around everything and between cards
GRID = WIDTH - BAR - 3 * EDGE  # pixels, width of all cards
CARDS = 12  # at most
HEADLINE, TEXT, LETTERS, SMALL = 72, 34, 30, 22  # pixels: headline, the line below, title of a card, captions

HEATMAP = (
    "The second picture of a card is the heatmap: the brighter, the more freedom the model has lost there to generate "
    "anything else. The white box is the region that the numbers are of."
)
GENERATED = "The third picture is the nearest of those that the model now generates from the caption."


def overview_of(report: Report) -> Image.Image | None:
    """The whole event; ``None`` for one that failed.

    A title, a card per probe (its title bar, image, heatmap and nearest generation), which probes have no card, and how
    to read it.
    """
    if not report.findings:
        return None
    event, by_name = report.to_event(), {f.name: f for f in report.findings}
    shown = [by_name[row.name] for row in event.worst_first[:CARDS]]
    panels = 3 if any(f.proof is not None for f in shown) else 2
    columns = min(len(shown), 5 - panels)
    width = (GRID - (columns - 1) * EDGE) // columns
    cards = [card(f, width, panels) for f in shown]
    head = stacked([headline(report), lines_of(measure(report), WIDTH - 2 * EDGE, TEXT)], 0)
    rows = [beside(cards[i : i + columns]) for i in range(0, len(cards), columns)]
    notes = [event.left_out(CARDS)]
    notes += [HEATMAP] if any(f.observation.image is not None for f in shown) else []
    notes += [GENERATED] if panels == 3 else []
    body = stacked([*rows, *(lines_of(note, GRID, SMALL) for note in notes if note)])
    bar = colour_bar(max(SHOWN, rows[0].height), SMALL)
    picture = Image.new("RGB", (WIDTH, head.height + max(body.height, bar.height) + 3 * EDGE), PAPER)
    picture.paste(head, (EDGE, EDGE))
    picture.paste(body, (EDGE, head.height + 2 * EDGE))
    picture.paste(bar, (WIDTH - BAR - EDGE, head.height + 2 * EDGE))
    return picture


def headline(report: Report) -> Image.Image:
    """The step, and how many probes have each verdict."""
    planned = report.config.max_train_steps
    when = f"Step {report.step} of {planned}" if planned else f"Step {report.step}"
    title = Image.new("RGB", (WIDTH - 2 * EDGE, round(HEADLINE * LEADING)), PAPER)
    text, font = fitting(f"{when}: {report.to_event().counts()}", title.width, HEADLINE)
    ImageDraw.Draw(title).text((0, title.height // 2), text, INK, font, anchor="lm")
    return title


def measure(report: Report) -> str:
    """Whether training stops, what the controls show, and what it takes to be called memorized."""
    stop = "memwatch stopped the training. " if report.stop_reason is not None else ""
    if controls := report.controls:
        held_out = f"{len(controls)} held-out control{'s' if len(controls) != 1 else ''}"
        reached = f"{held_out} reach{'es' if len(controls) == 1 else ''} {max(controls.values()):.1f}x at most"
        return f"{stop}{reached}; a probe can be called memorized from {report.config.alerts.min_severity:g}x on."
    if report.calibrated:
        return f"{stop}The controls were not compared with anything at this event."
    return f"{stop}There are no controls, so a probe can be called suspicious, but never memorized."


def card(finding: Finding, width: int, panels: int) -> Image.Image:
    """A probe's title bar and, where it has an image, its panels; ``panels``: into how many the width is shared."""
    title, proof = title_bar(finding, width, LETTERS), finding.proof
    if finding.observation.image is None:
        return title
    side = (width - (panels - 1) * MARGIN) // panels
    heat, caption = heat_panel(finding, side)
    shown = [image_panel(finding, side), (heat, caption.removeprefix("heatmap, "))]  # all of it does not fit
    if proof is not None:
        words = proof_words(copied_row(finding), finding.observation.probe.is_reference, brief=True)
        shown.append((fitted(proof.generations[nearest_of(proof) or 0], side, side), words))
    return stacked([title, row_of(*(centred(panel, side) for panel in shown), letters=SMALL)], 0)


def lines_of(text: str, width: int, size: int) -> Image.Image:
    """A text on as many lines as it takes; ``size`` of its letters in pixels."""
    lines, each = wrapped(text, width, size), round(size * LEADING)
    picture = Image.new("RGB", (width, len(lines) * each), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * each + each // 2), line, QUIET, font_of(size), anchor="lm")
    return picture


def stacked(pictures: Sequence[Image.Image], gap: int = EDGE) -> Image.Image:
    """Pictures below one another."""
    height = sum(each.height + gap for each in pictures) - gap
    sheet, top = Image.new("RGB", (max(each.width for each in pictures), height), PAPER), 0
    for each in pictures:
        sheet.paste(each, (0, top))
        top += each.height + gap
    return sheet


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width side by side."""
    row = Image.new("RGB", (GRID, max(each.height for each in pictures)), PAPER)
    for i, each in enumerate(pictures):
        row.paste(each, (i * (each.width + EDGE), 0))
    return row
