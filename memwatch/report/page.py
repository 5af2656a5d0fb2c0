"""The report page: one HTML file that holds a whole run, and asks the network for nothing. ``page.js`` draws it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import factor
from memwatch.report import text
from memwatch.report.drawing import MAX_FACTOR, STOPS, VERDICT_COLOURS, ink_on
from memwatch.report.frames import Frames, frames_of
from memwatch.report.history import Row, Run
from memwatch.run_folder import write_whole

PAGE = "report.html"
VERDICTS = list(Verdict)
STYLES = {verdict: str(verdict).replace(" ", "-") for verdict in Verdict}  # CSS classes
LOWEST_TOP = 2.0  # factor: the severity axis reaches at least this far, so that noise does not look like news

LOADER = PackageLoader("memwatch.report")
TEMPLATES = Environment(loader=LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.globals |= {
    "inlined": lambda name: Markup(LOADER.get_source(TEMPLATES, name)[0]),  # our own files; what a run says is escaped
    "text": text,
    "factor": factor,
    "median": median,
    "max_factor": MAX_FACTOR,
    "gradient": ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*stop) for stop in STOPS),
    "verdicts": VERDICTS,
    "styles": STYLES,
    "colours": VERDICT_COLOURS,
    "ink_on": ink_on,
}

Histories = Mapping[str, list[tuple[int, Row]]]  # by probe, with the steps


def write_page(folder: Path, file: Path | None = None) -> Path:
    """Write the page of the run or scan in ``folder``, whole or not at all; into ``report.html`` there by default.

    Raises:
        FileNotFoundError, ValueError: there is no run, see ``Run.read``.
    """
    file = file or folder / PAGE
    write_whole(file, render(Run.read(folder)))
    return file


def render(run: Run) -> str:
    """The page as text."""
    order, frames, histories = run.last.worst_first, frames_of(run), defaultdict(list)
    for step, row in run.rows:
        histories[row.name].append((step, row))
    charts = [severities(run, histories), losses(run)]
    return TEMPLATES.get_template("page.html").render(
        run=run,
        last=run.last,
        newest=run.events[-1],
        order=order,
        frames=frames,
        histories=histories,
        data=script_data(run, order, frames) | {"charts": charts},
        settings=yaml.safe_dump(run.about.settings, sort_keys=False, allow_unicode=True),
    )


def script_data(run: Run, order: list[Row], frames: Frames) -> dict[str, Any]:
    """What the page's script moves: by probe, pictures and numbers at every stop of the slider."""
    numbers = {
        (step, row.name): [VERDICTS.index(row.verdict), row.effect, row.reason, [r["box"] for r in row.regions]]
        for step, row in run.rows
    }
    steps = [event.step for event in run.events] + [step for step, _, _ in run.losses]
    return {
        "steps": frames.steps,
        "span": [min(steps), max(steps)],
        "pool": list(frames.pool),
        "side": frames.side,
        "styles": list(STYLES.values()),
        "words": [str(verdict) for verdict in VERDICTS],
        "probes": [
            {
                "images": frames.images[row.name],
                "maps": frames.maps[row.name],
                "rows": [numbers.get((step, row.name)) for step in frames.steps],
            }
            for row in order
        ],
    }


def severities(run: Run, histories: Histories) -> dict[str, Any]:
    """The first chart: severities by step and the controls' band; alerts, proofs and the stop."""
    judged = [(event.step, sorted(event.controls.values())) for event in run.events if event.controls]
    band = [[step, values[0], values[-1], values[len(values) // 2]] for step, values in judged]
    lines = [
        {
            "label": row.title,
            "style": STYLES[row.verdict],
            "probe": key,
            "points": [[step, round(each.severity, 4)] for step, each in histories[row.name]],
        }
        for key, row in enumerate(run.last.worst_first)
    ]
    found = [row.severity for _, row in run.rows] + [most for _, _, most, _ in band]
    values = [1.0, max(LOWEST_TOP, *found) * 1.05]
    stop = None if run.stop is None else run.stop.step
    return {"lines": lines, "values": values, "band": band, "marks": marks_of(run), "stop": stop}


def marks_of(run: Run) -> list[list[Any]]:
    """The signs of the first chart: step, value, kind and what it says."""
    marks: list[list[Any]] = []
    for step, row in run.rows:
        if row.alert:
            kind = "alert" if row.verdict is Verdict.MEMORIZED else "suspicion"
            marks.append([step, row.severity, kind, f"step {step}: {row.title} is {row.verdict}"])
        if row.copied and row.copied["copies"]:
            copies = f"{row.copied['copies']} of {row.copied['generations']} generations copy {row.title}"
            marks.append([step, row.severity, "proof", f"step {step}: {copies}"])
    return marks


def losses(run: Run) -> dict[str, Any] | None:
    """The second chart: the validation losses that the loop has logged; ``None`` where there are none."""
    if not run.losses:
        return None
    points = defaultdict(list)
    for step, key, value in run.losses:
        points[key].append([step, value])
    values = [value for _, _, value in run.losses]
    room = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    lines = [{"label": key, "style": f"series-{i % 6}", "points": each} for i, (key, each) in enumerate(points.items())]
    return {"lines": lines, "values": [min(values) - room, max(values) + room]}
