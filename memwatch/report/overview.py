"""Overview: one event on one picture, the worst probes first, beside what the controls show."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from memwatch.judge.alerts import Verdict
from memwatch.judge.findings import Finding
from memwatch.report.heatmap import fitted
from memwatch.report.picture import MARGIN, Panel, centred, heat_panel, image_panel, nearest_of, row_of
from memwatch.report.report import Report
from memwatch.report.severity_axis import band
from memwatch.report.title_bar import INK, LEADING, PAPER, QUIET, fitting, font_of, strip, wrapped

WIDTH = 1600  # pixels
EDGE = 24  # pixels, around everything and between cards
CHART = 400  # pixels, width of the band chart
GRID = WIDTH - CHART - 3 * EDGE  # pixels, width of all cards
CARDS = 12  # at most
HEADLINE, TEXT, LETTERS = 72, 34, 30  # pixels, of the title's lines and of a card's strip
CHART_HEIGHT = (420, 1000)  # pixels, at least and at most
SMALL = 22  # pixels, letters of captions and of the legend
HEATMAP = (
    "The second picture of each card is the heatmap: the brighter, the more freedom the model has lost there to "
    "generate anything else. The white box is the region that the numbers are of."
)
GENERATED = "The third picture is the nearest of those that the model now generates from the caption."
DOTS, GREY = "Each dot on the scale is a probe.", "The grey band is what the held-out controls show."


def overview_of(report: Report) -> Image.Image | None:
    """The whole event; ``None`` for one that failed.

    A title, a card per probe (its strip, image, heatmap and nearest generation), and all probes beside the controls.
    """
    if not report.findings:
        return None
    by_name = {f.name: f for f in report.findings}
    shown = [by_name[row.name] for row in report.to_event().worst_first[:CARDS]]
    title, cards = title_of(report), grid(shown, report)
    legend = legend_of(shown, report)
    height = min(max(cards.height - legend.height - EDGE, CHART_HEIGHT[0]), CHART_HEIGHT[1])
    chart = band(report, {f.name for f in shown}, CHART, height)
    top, right = title.height + 2 * EDGE, GRID + 2 * EDGE
    bottom = top + max(cards.height, height + EDGE + legend.height)
    picture = Image.new("RGB", (WIDTH, bottom + EDGE), PAPER)
    picture.paste(title, (EDGE, EDGE))
    picture.paste(cards, (EDGE, top))
    picture.paste(chart, (right, top))
    picture.paste(legend, (right, top + height + EDGE))
    return picture


def legend_of(findings: Sequence[Finding], report: Report) -> Image.Image:
    """How to read what is there."""
    is_there = {
        HEATMAP: any(f.observation.image is not None for f in findings),
        GENERATED: any(f.proof is not None for f in findings),
        DOTS: True,
        GREY: bool(report.controls),
    }
    return lines_of(" ".join(words for words in is_there if is_there[words]), CHART, SMALL)


def title_of(report: Report) -> Image.Image:
    """What happened, and what it is measured by."""
    width, first = WIDTH - 2 * EDGE, round(HEADLINE * LEADING)
    (text, font), below = fitting(headline(report), width, HEADLINE), lines_of(measure(report), width, TEXT)
    title = Image.new("RGB", (width, first + below.height), PAPER)
    ImageDraw.Draw(title).text((0, first // 2), text, INK, font, anchor="lm")
    title.paste(below, (0, first))
    return title


def lines_of(text: str, width: int, size: int) -> Image.Image:
    """A text on as many lines as it takes; ``size`` of its letters in pixels."""
    lines, each = wrapped(text, width, size), round(size * LEADING)
    picture = Image.new("RGB", (width, len(lines) * each), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, i * each + each // 2), line, QUIET, font_of(size), anchor="lm")
    return picture


def headline(report: Report) -> str:
    """The step and how many probes have the worst verdict."""
    planned = report.config.max_train_steps
    when = f"Step {report.step} of {planned}" if planned else f"Step {report.step}"
    count = len(report.findings)
    of = f"of {count} probe{'s' if count != 1 else ''}"
    if memorized := report.count(Verdict.MEMORIZED):
        return f"{when}: {memorized} {of} memorized"
    if suspicious := report.count(Verdict.SUSPICIOUS):
        return f"{when}: {suspicious} {of} suspicious"
    if (inconclusive := report.count(Verdict.INCONCLUSIVE)) == count:
        return f"{when}: no verdict"
    return f"{when}: no evidence in {count - inconclusive} {of}"


def measure(report: Report) -> str:
    """Whether training stops, what the controls show, and what it takes to be called memorized."""
    stop = "memwatch stopped the training. " if report.stop_reason is not None else ""
    controls, rule = report.controls, report.config.alerts
    if controls:
        held_out = f"{len(controls)} held-out control{'s' if len(controls) != 1 else ''}"
        reached = f"{held_out} reach{'es' if len(controls) == 1 else ''} {max(controls.values()):.1f}x at most"
        return f"{stop}{reached}; a probe can be called memorized from {rule.min_severity:g}x on."
    if report.calibrated:
        return f"{stop}The controls were not compared with anything at this event."
    return f"{stop}No controls: a probe is suspicious from {rule.uncalibrated_severity:g}x on, and none is memorized."


def grid(findings: Sequence[Finding], report: Report) -> Image.Image:
    """The cards in columns, row by row, and how many probes are left out."""
    panels = 3 if any(f.proof is not None for f in findings) else 2
    columns = min(len(findings), 5 - panels)
    width = (GRID - (columns - 1) * EDGE) // columns
    cards = [card(f, width, panels, report.config.heatmap.max_factor) for f in findings]
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    left_out = len(report.findings) - len(findings)
    last = round(LETTERS * LEADING) if left_out else -EDGE
    sheet = Image.new("RGB", (GRID, sum(max(c.height for c in row) + EDGE for row in rows) + last), PAPER)
    top = 0
    for row in rows:
        for i, each in enumerate(row):
            sheet.paste(each, (i * (width + EDGE), top))
        top += max(c.height for c in row) + EDGE
    if left_out:
        ImageDraw.Draw(sheet).text((0, top), f"and {left_out} more", QUIET, font_of(LETTERS))
    return sheet


def card(finding: Finding, width: int, panels: int, max_factor: float) -> Image.Image:
    """A probe's strip and, where it has an image, its panels.

    Args:
        panels: into how many the width is shared.
    """
    title = strip(finding, width, LETTERS)
    if finding.observation.image is None:
        return title
    side = (width - (panels - 1) * MARGIN) // panels
    shown = [image_panel(finding, side), heat_panel(finding, max_factor, side), *generation(finding, side)]
    shown[1] = (shown[1][0], shown[1][1].removeprefix("heatmap, "))  # all of it does not fit
    row = row_of(*(centred(panel, side) for panel in shown), letters=SMALL)
    picture = Image.new("RGB", (width, title.height + row.height), PAPER)
    picture.paste(title, (0, 0))
    picture.paste(row, (0, title.height))
    return picture


def generation(finding: Finding, side: int) -> list[Panel]:
    """The generation nearest to the probe and how many copy it; none where nothing was generated."""
    proof = finding.proof
    if proof is None:
        return []
    nearest, found = nearest_of(proof), f"{proof.copied} of {len(proof.generations)}"
    words = "copy it" if finding.observation.probe.is_reference else "are alike"
    caption = "generated now" if nearest is None else f"{found} {words}"
    return [(fitted(proof.generations[nearest or 0], side, side), caption)]
