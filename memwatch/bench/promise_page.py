"""The page of ``memwatch promise``: which settings keep the promise, how often each fails it, and what each finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from memwatch.bench.promise import STORED, TAILS, Cell, Outcome
from memwatch.judge.calibration import MIN_CONTROLS
from memwatch.report.about import machine

NAMES = {"normal": "normal", "t5": "heavy tails (t, 5 degrees of freedom)", "lognormal": "skewed (lognormal)"}
PAGE = """# The promise, simulated

`{command}`: {settings} settings, {runs} each, {minutes:.1f} minutes. {machine}.

The promise: a run in which nothing is stored calls anything memorized with a probability of {promised} at most
(`alerts.false_alarms_per_run`), for any number of probes and events, however the events depend on each other. Here
severities are drawn at random on the log scale, and the rule is memwatch's own: p-values, budget, patience, check by
ranks, audit. Only the smallest effect is left out, because it would hide what the statistics do.

{summary}

{failing}

Each entry below is the share of runs with a false alarm / the share of runs that find one probe which is stored at
{stored:g} standard deviations of the controls from the middle of the run on, both in %. **Bold**: the promise is
broken, because the 95 % interval of the first number lies above it. The columns are probes x events.
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
        outcomes: of cells of any number and kind.
        promised: ``alerts.false_alarms_per_run``.
        command: that made them.
        minutes: that it took.
    """
    groups = {tail: [o for o in outcomes if o.cell.tail == tail] for tail in TAILS}
    by_tail = {tail: group for tail, group in groups.items() if group}
    failing = [NAMES[tail] for tail, group in by_tail.items() if not all(o.keeps(promised) for o in group)]
    head = PAGE.format(
        command=command,
        settings=len(outcomes),
        runs=runs_text(outcomes),
        minutes=minutes,
        machine=machine("memwatch", "numpy", "scipy"),
        promised=percent(promised),
        summary="\n".join(summary(by_tail, promised)),
        failing=FAILING.format(kinds="; ".join(failing), audited=MIN_CONTROLS + 1) if failing else KEPT,
        stored=STORED,
    )
    tables = ["\n".join([f"\n## {NAMES[tail].capitalize()}\n", *rates(o, promised)]) for tail, o in by_tail.items()]
    return "\n".join([head.rstrip("\n"), *tables]) + "\n"


def percent(share: float) -> str:
    """``0.5 %``, ``72 %``: one decimal below ten."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def runs_text(outcomes: Sequence[Outcome]) -> str:
    """How many runs: one number, or the smallest and the largest."""
    fewest, most = min(o.runs for o in outcomes), max(o.runs for o in outcomes)
    return f"{most} runs" if fewest == most else f"{fewest} to {most} runs"


def summary(by_tail: dict[str, list[Outcome]], promised: float) -> Iterator[str]:
    """A table: one row per distribution."""
    yield (
        "| severities | settings that keep the promise | most false alarms (95 % interval) | where "
        "| finds what is stored: fewest, median | a control is called |"
    )
    yield "|---|---|---|---|---|---|"
    for tail, group in by_tail.items():
        worst = max(group, key=lambda o: o.rate)
        low, high = worst.interval
        power = [o.power for o in group]
        audit = sum(o.contradicted for o in group) / sum(o.runs for o in group)
        yield (
            f"| {NAMES[tail]} | {sum(o.keeps(promised) for o in group)} of {len(group)} "
            f"| {percent(worst.rate)} ({percent(low)} to {percent(high)}) | {place(worst.cell)} "
            f"| {percent(min(power))}, {percent(median(power))} | in {percent(audit)} of runs |"
        )


def place(cell: Cell) -> str:
    """A setting in words."""
    probes = f"{cell.probes} probe{'s' if cell.probes > 1 else ''}"
    return f"{cell.controls} controls, {probes}, {cell.events} events, autocorrelation {cell.autocorrelation:g}"


def rates(group: Sequence[Outcome], promised: float) -> Iterator[str]:
    """A table: controls and autocorrelation down, probes and events across; false alarms and power in %."""
    found = {(o.cell.controls, o.cell.autocorrelation, o.cell.probes, o.cell.events): o for o in group}
    rows = sorted({key[:2] for key in found})
    columns = sorted({key[2:] for key in found})
    yield "| controls | autocorrelation | " + " | ".join(f"{probes} x {events}" for probes, events in columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for row in rows:
        cells = [entry(found[row + column], promised) if row + column in found else "" for column in columns]
        yield f"| {row[0]} | {row[1]:g} | " + " | ".join(cells) + " |"


def entry(outcome: Outcome, promised: float) -> str:
    """``1.2 / 98``: false alarms and power in %."""
    rate = f"{100 * outcome.rate:.1f}"
    return f"{rate if outcome.keeps(promised) else f'**{rate}**'} / {100 * outcome.power:.0f}"
