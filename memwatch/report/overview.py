"""One event on one picture: a card per probe, the worst first, under the headline of the event."""

from __future__ import annotations

from PIL import Image

from memwatch.judge.findings import Finding
from memwatch.report.heatmap import BAR, colour_bar
from memwatch.report.picture import MARGIN, heat_panel, image_panel, nearest_of, row_of
from memwatch.report.report import Report
from memwatch.report.tiles import PAPER, SHOWN, Picture, fitted, joined, line_of, paragraph, title_bar

WIDTH = 1600  # pixels
EDGE = 24  # pixels, around everything and between cards
GRID = WIDTH - BAR - 3 * EDGE  # pixels, width of all cards
CARDS = 12  # at most
HEADLINE, TEXT, LETTERS, SMALL = 72, 34, 30, 22  # pixels: headline, the line below, title of a card, notes

HEATMAP = (
    "The second picture of a card is the heatmap: the brighter, the more freedom the model has lost there to generate "
    "anything else. The white box is the region that the numbers are of."
)
GENERATED = "The third picture is the nearest of those that the model now generates from the caption."


def overview_of(report: Report) -> Picture | None:
    """The whole event; ``None`` for one that failed.

    A title, a card per probe (its title bar, image, heatmap and nearest generation), which probes have no card, and how
    to read it.
    """
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
    body = joined([*rows, *(paragraph(note, GRID, SMALL) for note in notes if note)], EDGE, down=True)
    bar = colour_bar(max(SHOWN, rows[0].height), SMALL)
    content = joined([head(report), joined([body, bar], EDGE)], EDGE, down=True)
    picture = Image.new("RGB", (WIDTH, content.height + 2 * EDGE), PAPER)
    picture.paste(content, (EDGE, EDGE))
    return picture


def head(report: Report) -> Picture:
    """The step and how many probes have each verdict; below it the text of ``measure``."""
    planned, width = report.config.max_train_steps, WIDTH - 2 * EDGE
    when = f"Step {report.step} of {planned}" if planned else f"Step {report.step}"
    title = line_of(f"{when}: {report.event.counts()}", width, HEADLINE)
    return joined([title, paragraph(measure(report), width, TEXT)], down=True)


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


def card(report: Report, finding: Finding, width: int, panels: int) -> Picture:
    """A probe's title bar and, where it has an image, its panels; ``panels``: into how many the width is shared."""
    row, proof = report.rows[finding.name], finding.proof
    title = title_bar(row, width, LETTERS)
    if finding.observation.image is None:
        return title
    side = (width - (panels - 1) * MARGIN) // panels
    heat, caption = heat_panel(finding, side)
    shown = [image_panel(finding, side), (heat, caption.removeprefix("heatmap, "))]  # all of it does not fit
    if proof is not None:
        shown.append((fitted(proof.generations[nearest_of(proof) or 0], side, side), row.proof(brief=True)))
    return joined([title, row_of(shown, side)], down=True)
