"""The report page: one HTML file that holds a whole run, and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memwatch.judge.verdict import Verdict
from memwatch.measure.signals import factor
from memwatch.report.advice import advice_of, headline, not_watched
from memwatch.report.copied import proof_words
from memwatch.report.forecasts import ahead
from memwatch.report.frames import Frames, frames_of
from memwatch.report.heatmap import STOPS
from memwatch.report.history import Event, Row, Run
from memwatch.report.timeline import STYLES, level_curves, loss_timeline, rows_by_name, severity_timeline
from memwatch.report.title_bar import VERDICT_COLOURS
from memwatch.run_folder import write_whole

PAGE = "report.html"
VERDICTS = list(Verdict)


def write_page(folder: Path, file: Path | None = None, *, renew: float | None = None) -> Path:
    """Write the page of a run or a scan, whole or not at all.

    Args:
        folder: its ``output_dir``.
        file: where the page goes; ``report.html`` in the folder by default.
        renew: seconds after which an open page reads itself again; ``None`` for never.

    Raises:
        FileNotFoundError, ValueError: there is no run, see ``Run.read``.
    """
    file = file or folder / PAGE
    write_whole(file, render(Run.read(folder), renew=renew))
    return file


def render(run: Run, *, renew: float | None = None) -> str:
    """The page as text."""
    about, settings = run.about, run.about.settings
    max_factor = 6.0
    frames = frames_of(run, max_factor)
    order, by_name = run.last.worst_first, rows_by_name(run)
    return (
        templates()
        .get_template("page.html")
        .render(
            run=run,
            last=run.last,
            newest=run.events[-1],
            order=order,
            frames=frames,
            headline=headline(run),
            timeline=severity_timeline(run),
            losses=loss_timeline(run),
            curves={row.name: level_curves(run, by_name[row.name]) for row in order},
            histories={name: [(e.step, r) for e, r in pairs] for name, pairs in by_name.items()},
            advice=advice_of,
            proof=proof_words,
            cells=region_cells,
            not_watched=not_watched(run),
            forecasts=ahead(run),
            costs=costs(run),
            controls=controls(run.last),
            max_factor=max_factor,
            gradient=", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*stop) for stop in STOPS),
            styles=STYLES,
            colours=VERDICT_COLOURS,
            verdicts=VERDICTS,
            data=script_data(run, order, frames),
            settings=yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True) if settings else "",
            versions=[*filter(None, [about.machine]), *(f"{name} {number}" for name, number in about.versions.items())],
            renew=renew,
        )
    )


def script_data(run: Run, order: list[Row], frames: Frames) -> dict[str, Any]:
    """What the page's script moves: by probe, pictures and numbers at every stop of the slider."""
    by_step = {event.step: {row.name: row for row in event.rows} for event in run.events}

    def numbers(name: str, step: int) -> list[Any] | None:
        row = by_step[step].get(name)
        if row is None:
            return None
        p = "no p" if row.p is None else f"p {row.p:.1g}"
        return [VERDICTS.index(row.verdict), f"{row.severity:.1f}x", p, boxes(row)]

    return {
        "steps": frames.steps,
        "pool": frames.pool,
        "side": frames.side,
        "styles": [STYLES[verdict] for verdict in VERDICTS],
        "words": [str(verdict) for verdict in VERDICTS],
        "probes": [
            {
                "images": frames.images[row.name],
                "maps": frames.maps[row.name],
                "rows": [numbers(row.name, step) for step in frames.steps],
            }
            for row in order
        ],
    }


def region_cells(region: Mapping[str, Any]) -> list[str]:
    """A region under the page's header: box, area, effect, its logarithm and error, p, noise level."""
    error = "" if region["sem"] is None else f" ± {region['sem']:.2f}"
    p = "-" if region["p"] is None else f"{region['p']:.2g}"
    level = "-"
    box, effect = ", ".join(map(str, region["box"])), region["effect"]
    return [box, f"{region['area']:.0%}", f"{factor(effect):.2f}x", f"{effect:.2f}{error}", p, level]


def boxes(row: Row) -> list[list[int]]:
    """Regions in pixels of the image: left, top, right, bottom."""
    return [list(region["box"]) for region in row.regions]


def costs(run: Run) -> list[tuple[str, str]]:
    """What the run's events have cost."""
    seconds = [event.seconds for event in run.events]
    last = run.events[-1]
    found = [("events", str(len(seconds))), ("seconds of all events", f"{sum(seconds):.1f}")]
    found.append(("seconds per event, median and largest", f"{median(seconds):.1f}, {max(seconds):.1f}"))
    if last.overhead is not None:
        found.append(("share of training time", f"{100 * last.overhead:.1f} %"))
    if (measured := (run.last.scalars or {}).get("memwatch/measured")) is not None:
        found.append(("curvature measured at the last event", f"{measured:.0f} pictures"))
    found.append(("failures of memwatch's own parts", str(last.errors)))
    return found


def controls(event: Event) -> dict[str, Any]:
    """The controls of one event, the strongest first."""
    found = sorted((event.controls or {}).items(), key=lambda item: -item[1])
    return {"number": len(found), "strongest": found[:5], "audit": event.audit}


def plain(value: Any) -> Any:
    """As YAML takes it: tuples are lists, and what it does not know is text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


@cache
def templates() -> Environment:
    """The page's templates; everything that a run says is escaped."""
    loader = PackageLoader("memwatch.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def inlined(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])  # our own files

    environment.globals["inlined"] = inlined
    environment.filters["lines"] = lambda text: Markup("<br>").join(text.splitlines())  # it escapes each line
    return environment
