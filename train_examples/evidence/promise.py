"""The promise, simulated: how often a run in which nothing is stored calls something memorized, and what it finds.

python train_examples/evidence/promise.py --runs 200 --seed 1 --output train_examples/results/promise.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from memwatch.config_file import load_config
from memwatch.report.about import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.pages.markdown import markdown_table
from evidence.simulation import OTHERS, STORED, TAILS, Called, Cell, Outcome, grid, simulate

PAGE = """# The promise, simulated

`{command}`: {settings} settings, {runs} runs each, {minutes:.1f} minutes. {machine}.

The promise: a run in which nothing is stored calls anything memorized with a probability of {promised} at most
(`alerts.false_alarms_per_run`), for any number of probes and events, however the events depend on each other. Here
the maps of all pictures are drawn at random, smooth and on the log scale. memwatch's own statistic and
threshold decide.

A setting is *kept* where the 95 % interval of its share of runs with a false alarm does not lie above the promise.
*False alarm*: share of runs that call any probe of which nothing is stored. *Found*: share of runs that call one more
probe, which is stored at {strong:g} or {weak:g} standard deviations of the severities on a quarter of the picture from
the middle of the run on. *Delay*: events until the former is called, where it is. *At one event*: by T of each event
alone and not by the mean of three, which is what that costs and what it is for.

## In short

{short}

## Other severities, in the middle setting

20 controls, 8 probes, 20 events, an autocorrelation of 0.8.

{others}

## All settings

False alarms, and what is found at {strong:g} deviations, by kind of severity. **Bold**: not kept.

{table}
"""


def page(outcomes: Sequence[Outcome], promised: float, command: str, minutes: float) -> str:
    """Markdown.

    Args:
        outcomes: of any settings, of equally many runs.
        promised: ``alerts.false_alarms_per_run``.
        minutes: that it took.
    """
    regular = [o for o in outcomes if not o.cell.other]
    by_tail = {tail: [o for o in regular if o.cell.tail == tail] for tail in TAILS}
    return PAGE.format(
        command=command,
        settings=len(outcomes),
        runs=outcomes[0].runs,
        minutes=minutes,
        machine=machine("memwatch", "numpy", "scipy"),
        promised=percent(promised),
        strong=STORED[0],
        weak=STORED[1],
        short=markdown_table(
            [row for tail, found in by_tail.items() if found for row in in_short(tail, found, promised)]
        ),
        others=markdown_table([other_row(o, promised) for o in outcomes if o.cell.other]),
        table=markdown_table(setting_rows(by_tail, promised)),
    )


def in_short(tail: str, outcomes: Sequence[Outcome], promised: float) -> list[dict[str, Any]]:
    """Of all settings of a tail: the rule's row, and the one by each event alone."""
    rows = []
    for name, ruled in (("the rule", [o.rule for o in outcomes]), ("one event", [o.at_once for o in outcomes])):
        kept = sum(Outcome(o.cell, o.runs, r, r).keeps(promised) for o, r in zip(outcomes, ruled, strict=True))
        middle = [r for o, r in zip(outcomes, ruled, strict=True) if o.cell == Cell(tail=tail)]
        runs = outcomes[0].runs
        rows.append(
            {
                "severities": TAILS[tail],
                "by": name,
                "kept": f"{kept} of {len(outcomes)}",
                "false alarm, mean": percent(float(np.mean([r.alarmed for r in ruled])) / runs),
                "largest": percent(max(r.alarmed for r in ruled) / runs),
                "middle setting": ", ".join(percent(r.alarmed / runs) for r in middle) or "-",
                **found_by(ruled, runs),
                "middle setting, found": ", ".join(" and ".join(percent(n / runs) for n in r.found) for r in middle)
                or "-",
            }
        )
    return rows


def found_by(ruled: Sequence[Called], runs: int) -> dict[str, str]:
    """Means over settings: what is found at each strength, and the delay."""
    shares = np.mean([r.found for r in ruled], axis=0) / runs
    delays = [r.delay for r in ruled if np.isfinite(r.delay)]
    found = {f"found at {strength:g}": percent(share) for strength, share in zip(STORED, shares, strict=True)}
    return found | {"delay": f"{np.mean(delays):.1f}" if delays else "-"}


def other_row(outcome: Outcome, promised: float) -> dict[str, str]:
    runs, rule, alone = outcome.runs, outcome.rule, outcome.at_once
    return {
        "severities": f"{TAILS[outcome.cell.tail]}; {OTHERS[outcome.cell.other]}",
        "false alarm": alarm(outcome, promised),
        **found_by([rule], runs),
        "at one event: false alarm": percent(alone.alarmed / runs),
        "found at 8, at one event": percent(alone.found[0] / runs),
    }


def setting_rows(by_tail: dict[str, list[Outcome]], promised: float) -> list[dict[str, str]]:
    """One row per setting, with columns for each tail."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for tail, outcomes in by_tail.items():
        for o in outcomes:
            c = o.cell
            named = {
                "controls": c.controls,
                "probes": c.probes,
                "events": c.events,
                "autocorrelation": c.autocorrelation,
            }
            row = rows.setdefault(tuple(named.values()), {key: f"{value:g}" for key, value in named.items()})
            row[f"{tail}: false alarm"] = alarm(o, promised)
            row[f"{tail}: found"] = percent(o.rule.found[0] / o.runs)
    return list(rows.values())


def alarm(outcome: Outcome, promised: float) -> str:
    rate = percent(outcome.rule.alarmed / outcome.runs)
    return rate if outcome.keeps(promised) else f"**{rate}**"


def percent(share: float) -> str:
    """``0.5 %``, ``72 %``: one decimal below ten."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def cells() -> list[Cell]:
    """The grid for every tail, then other severities in the middle setting."""
    others = [Cell(other=other) for other in OTHERS]
    return [Cell(*setting, tail=tail) for tail in TAILS for setting in grid()] + others


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every setting and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=200, help="simulated per setting (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the random numbers; 0 chose the rule (default: %(default)s)")
    add("--config", type=Path, help="whose alerts are simulated (default: the shipped settings)")
    add("--output", type=Path, metavar="FILE.md", help="write the page there; it is printed otherwise")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.seed < 0:
        parser.error("--runs takes 1 or greater, --seed 0 or greater")
    rate, began = load_config(args.config).alerts.false_alarms_per_run, time.monotonic()
    outcomes = [simulate(cell, args.runs, rate, args.seed) for cell in tqdm(cells(), disable=None)]
    command = f"promise.py --runs {args.runs} --seed {args.seed}"
    text = page(outcomes, rate, command, (time.monotonic() - began) / 60)
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
