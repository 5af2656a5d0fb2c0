"""The promise, simulated: how often a run in which nothing is stored calls something memorized, and what it finds.

python train_examples/evidence/promise.py --runs 400 --output train_examples/results/promise.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from memwatch.config_file import load_config
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.pages.markdown import markdown_table
from evidence.simulation import FALLS, SPREAD, STORED, TAILS, Outcome, cells, simulate

PAGE = """# The promise, simulated

`{command}`: {settings} settings, {runs} runs each, {minutes:.1f} minutes. {machine}.

The promise: a run in which nothing is stored calls anything memorized with a probability of {promised} at most
(`alerts.false_alarms_per_run`), for any number of probes and events, however the events depend on each other. Here
what the network would say of every picture is drawn at random, on the log scale with a standard deviation of {spread:g}
for variance and loss alike, and memwatch's own screen and judge decide. Only the smallest severity of an alert is left
out, because it would hide what the statistics do.

The promise is {verdict}

*False alarms*: share of runs that call any probe of which nothing is stored, with its 95 % interval; **bold** where the
promise is broken, because the interval lies above it. *Found*: share of runs that call one more probe, which is stored
at {stored:g} standard deviations of the controls on a quarter of the picture from the middle of the run on. *A control
is called*: share of runs in which the same rule calls a control, which caps later verdicts. *Measured*: share of
curvature that the screen asked for before anything was stored. *Falls*: by how much (a natural log) variance and loss
fall on every picture alike until the end of the run, because the model learns.

{table}
"""


def page(outcomes: Sequence[Outcome], promised: float, command: str, minutes: float) -> str:
    """Markdown.

    Args:
        outcomes: of cells of any number and kind, of equally many runs.
        promised: ``alerts.false_alarms_per_run``.
        minutes: that it took.
    """
    broken = [o for o in outcomes if not o.keeps(promised)]
    tails = "; ".join(name for tail, name in TAILS.items() if any(o.cell.tail == tail for o in broken))
    verdict = f"broken in {len(broken)} settings, where severities are of this kind: {tails}."
    return PAGE.format(
        command=command,
        settings=len(outcomes),
        runs=outcomes[0].runs,
        minutes=minutes,
        machine=machine("memwatch", "numpy", "scipy", "torch"),
        promised=percent(promised),
        spread=SPREAD,
        stored=STORED,
        verdict=verdict if broken else "kept in every setting.",
        table=markdown_table([row(o, promised) for o in outcomes]),
    )


def row(outcome: Outcome, promised: float) -> dict[str, str]:
    """A setting and what came out of it, by column."""
    cell, runs = outcome.cell, outcome.runs
    low, high = map(percent, outcome.interval)
    rate = percent(outcome.alarmed / runs)
    rate = rate if outcome.keeps(promised) else f"**{rate}**"
    numbers = {name: f"{getattr(cell, name):g}" for name in ("controls", "probes", "events", "autocorrelation")}
    return {
        "severities": TAILS[cell.tail],
        "falls": " and ".join(f"{fall:g}" for fall in FALLS[cell.fall]) if cell.fall else "-",
        **numbers,
        "false alarms": f"{rate} ({low} to {high})",
        "found": percent(outcome.found / runs),
        "a control is called": percent(outcome.contradicted / runs),
        "measured": percent(outcome.measured),
    }


def percent(share: float) -> str:
    """``0.5 %``, ``72 %``: one decimal below ten."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every setting and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=100, help="simulated per setting (default: %(default)s, about an hour)")
    add("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    add("--config", type=Path, help="whose alerts are simulated (default: the shipped settings)")
    add("--output", type=Path, metavar="FILE.md", help="write the page there; it is printed otherwise")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.seed < 0:
        parser.error("--runs takes 1 or greater, --seed 0 or greater")
    rule, began = load_config(args.config).alerts, time.monotonic()
    outcomes = [simulate(cell, args.runs, rule, args.seed) for cell in tqdm(list(cells()), disable=None)]
    command = f"promise.py --runs {args.runs} --seed {args.seed}"
    text = page(outcomes, rule.false_alarms_per_run, command, (time.monotonic() - began) / 60)
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
