"""Timelines of a run: severities against the controls, validation losses below them, one probe's noise levels."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from memwatch.config import AlertsConfig
from memwatch.judge.verdict import Verdict
from memwatch.report.chart import Axes, Line, Mark, across, band, frame, labels, line, mark, svg, upright
from memwatch.report.history import Event, Row, Run

STYLES = {verdict: str(verdict).replace(" ", "-") for verdict in Verdict}  # CSS classes
HEIGHT, WIDTH, WITH_LOSSES = 240, 960, (740, 460)  # of the timelines; the last: where they lie side by side
LOWEST_TOP = 2.0  # factor: the severity axis reaches at least this far, so that noise does not look like news


def severity_timeline(run: Run) -> Markup:
    """Every probe's severity by step, the controls' band and the alert level; alerts, proofs and the stop as signs."""
    by_name = rows_by_name(run)
    rows = [pair for pairs in by_name.values() for pair in pairs]
    level, words = alert_level(run)
    found = [row.severity for _, row in rows] + [v for e in run.events for v in (e.controls or {}).values()]
    width = WITH_LOSSES[0] if run.losses else WIDTH
    axes = Axes(span(run), (1.0, max(LOWEST_TOP, 1.1 * level, *found) * 1.05), width=width, height=HEIGHT, is_log=True)
    curves = [
        Line([(e.step, r.severity) for e, r in by_name[row.name]], row.name, STYLES[row.verdict], key)
        for key, row in enumerate(run.last.worst_first)
    ]
    held = [(e.step, sorted(e.controls.values())) for e in run.events if e.controls]
    limits = [(step, values[0], values[-1]) for step, values in held]
    middle = Line([(step, values[len(values) // 2]) for step, values in held], "median of the controls", "median")
    parts = [frame(axes, "x"), band(axes, limits), line(axes, middle)]
    parts += [across(axes, level, words, "level")]
    parts += [line(axes, one) for one in reversed(curves)]  # the worst on top
    parts += [mark(axes, one) for event, row in rows for one in marks_of(event, row)]
    if run.stop is not None:
        parts.append(upright(axes, run.stop.step, f"stop, step {run.stop.step}", "stop"))
    parts += [labels(axes, curves), cursor(axes, run)]
    return svg(axes, "Severity of every probe by optimizer step", *parts, style="timeline")


def alert_level(run: Run) -> tuple[float, str]:
    """The factor that an alert takes, and what that alert is."""
    given, rule = run.about.settings.get("alerts", {}), AlertsConfig()
    if run.last.calibrated:
        level = float(given.get("min_severity", rule.min_severity))
        return level, f"alert level {level:g}x"
    level = 2.0
    return level, f"suspicious from {level:g}x, without controls"


def marks_of(event: Event, row: Row) -> list[Mark]:
    """The signs of one probe at one event."""
    found = []
    if row.alert:
        kind = "alert" if row.verdict is Verdict.MEMORIZED else "suspicion"
        found.append(Mark(event.step, row.severity, kind, f"step {event.step}: {row.name} is {row.verdict}"))
    if row.copied and row.copied["copies"]:
        says = f"step {event.step}: {row.copied['copies']} of {row.copied['generations']} generations copy {row.name}"
        found.append(Mark(event.step, row.severity, "proof", says))
    return found


def loss_timeline(run: Run) -> Markup | None:
    """The validation losses that the loop has logged, over the same steps; ``None`` where there are none."""
    if not run.losses:
        return None
    keys = list(dict.fromkeys(key for _, key, _ in run.losses))
    values = [value for _, _, value in run.losses]
    room = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    axes = Axes(span(run), (min(values) - room, max(values) + room), width=WITH_LOSSES[1], height=HEIGHT, right=110)
    curves = [
        Line([(step, value) for step, k, value in run.losses if k == key], key, f"series-{i % 6}")
        for i, key in enumerate(keys)
    ]
    parts = [frame(axes), *(line(axes, one) for one in curves), labels(axes, curves), cursor(axes, run)]
    return svg(axes, "Validation loss by optimizer step", *parts, style="timeline")


def level_curves(run: Run, history: Sequence[tuple[Event, Row]]) -> Markup | None:
    """How strong one probe is at each noise level, by step; ``None`` where nothing was compared.

    Args:
        history: the probe's own of ``rows_by_name``.
    """
    rows = [(event.step, row) for event, row in history if row.levels]
    if not rows:
        return None
    timesteps = rows[-1][1].timesteps
    curves = [
        Line([(step, row.levels[i]) for step, row in rows if i < len(row.levels)], f"t = {t:g}", f"series-{i % 6}")
        for i, t in enumerate(timesteps)
    ]
    top = max(value for one in curves for _, value in one.points)
    axes = Axes(span(run), (1.0, max(LOWEST_TOP, 1.05 * top)), width=560, height=210, is_log=True)
    parts = [frame(axes, "x"), *(line(axes, one) for one in curves), labels(axes, curves), cursor(axes, run)]
    return svg(axes, f"{rows[-1][1].name}: factor at each noise level by optimizer step", *parts)


def span(run: Run) -> tuple[float, float]:
    """The steps that all charts of a run show: from its first event to its last, or to its last loss."""
    steps = [event.step for event in run.events] + [step for step, _, _ in run.losses]
    return min(steps), max(steps)


def cursor(axes: Axes, run: Run) -> Markup:
    """The line at the step that the page shows; its script moves it."""
    return upright(axes, run.events[-1].step, "", "cursor")


def rows_by_name(run: Run) -> dict[str, list[tuple[Event, Row]]]:
    """By probe, its rows with their events, oldest first."""
    found: dict[str, list[tuple[Event, Row]]] = {}
    for event in run.events:
        for row in event.rows:
            found.setdefault(row.name, []).append((event, row))
    return found
