"""The page of ``memwatch promise``: how often each setting fails the promise, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence

from evidence.pages.markdown import markdown_table
from evidence.promise import FALLS, SPREAD, STORED, Cell, Outcome

from memwatch.measure.probes import MIN_CONTROLS
from memwatch.report.about import machine

NAMES = {"normal": "normal", "t5": "heavy tails (t, 5 degrees of freedom)", "lognormal": "skewed (lognormal)"}
FALLEN = {"": "-", **{name: " and ".join(f"{f:g}" for f in falls) for name, falls in FALLS.items() if name}}
PAGE = """# The promise, simulated

`{command}`: {settings} settings, {runs} runs each, {minutes:.1f} minutes. {machine}.

The promise: a run in which nothing is stored calls anything memorized with a probability of {promised} at most
(`alerts.false_alarms_per_run`), for any number of probes and events, however the events depend on each other. Here
what the network would say of every picture is drawn at random, on the log scale with a standard deviation of {spread:g}
for variance and loss alike, and memwatch's own code judges it: the screen, regions, p-values, budget, patience, check
by ranks, audit. Only the smallest effect is left out, because it would hide what the statistics do.

{verdict}

*False alarms*: share of runs that call any probe of which nothing is stored, with its 95 % interval; **bold** where the
promise is broken, because the interval lies above it. *Found*: share of runs that call one more probe, which is stored
at {stored:g} standard deviations of the controls on a quarter of the picture from the middle of the run on. *Measured*:
share of curvature that the screen asked for before that. *Falls*: by how much (a natural log) variance and loss fall on
every picture alike until the end of the run, because the model learns.

{table}
"""
KEPT = "The promise is kept in every setting."
FAILING = """The promise cannot be kept in every setting where severities are of this kind: {kinds}.
The p-value (a predictive t) takes the log factors of controls as normal. memwatch answers with the audit, which runs
the same rule on the controls: once it calls one of them, a probe is *memorized* only with twice that control's
evidence (the square of its p-value), else *suspicious*, and its reason says why. It takes {audited} controls to audit
any, and many of them to see a rate that is small for each probe; the audit's own text says which rate is plausible."""


def page(outcomes: Sequence[Outcome], promised: float, command: str, minutes: float) -> str:
    """Markdown.

    Args:
        outcomes: of cells of any number and kind, of equally many runs.
        promised: ``alerts.false_alarms_per_run``.
        command: that made them.
        minutes: that it took.
    """
    failing = [
        name for tail, name in NAMES.items() if any(o.cell.tail == tail and not o.keeps(promised) for o in outcomes)
    ]
    return PAGE.format(
        command=command,
        settings=len(outcomes),
        runs=outcomes[0].runs,
        minutes=minutes,
        machine=machine("memwatch", "numpy", "scipy", "torch"),
        promised=percent(promised),
        spread=SPREAD,
        stored=STORED,
        verdict=FAILING.format(kinds="; ".join(failing), audited=MIN_CONTROLS) if failing else KEPT,
        table=markdown_table([setting(o.cell) | result(o, promised) for o in outcomes]),
    )


def percent(share: float) -> str:
    """``0.5 %``, ``72 %``: one decimal below ten."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def setting(cell: Cell) -> dict[str, str]:
    """A setting, by column."""
    numbers = {"controls": cell.controls, "probes": cell.probes, "events": cell.events}
    shown = {name: f"{value:g}" for name, value in (numbers | {"autocorrelation": cell.autocorrelation}).items()}
    return {"severities": NAMES[cell.tail], "falls": FALLEN[cell.fall], **shown}


def result(outcome: Outcome, promised: float) -> dict[str, str]:
    """What came out of it, by column."""
    low, high = map(percent, outcome.interval)
    rate = percent(outcome.rate) if outcome.keeps(promised) else f"**{percent(outcome.rate)}**"
    called = percent(outcome.contradicted / outcome.runs)
    alarms = f"{rate} ({low} to {high})"
    shares = {"found": percent(outcome.power), "a control is called": called, "measured": percent(outcome.measured)}
    return {"false alarms": alarms, **shares}
