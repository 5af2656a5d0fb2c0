"""``memwatch promise``: simulate how often a run in which nothing is stored raises an alarm."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from evidence.old.promise_page import page
from evidence.promise import cells, simulate
from tqdm.auto import tqdm

from memwatch.config_file import load_config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "How often memwatch calls something memorized where nothing is stored, in many settings."
    add = parser.add_argument
    add("--runs", type=int, default=100, help="simulated per setting (default: %(default)s, about an hour)")
    add("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    add("--config", type=Path, help="whose alerts are simulated (the shipped one)")
    add("--output", type=Path, metavar="FILE.md", help="write the page there; it is printed otherwise")


def run(args: argparse.Namespace) -> int:
    """Simulate every setting and write the page."""
    for option, value, least in (("--runs", args.runs, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{option}: got {value}, allowed: {least} or greater")
    rule, began = load_config(args.config).alerts, time.monotonic()
    bar = tqdm(list(cells()), disable=None, unit="setting")
    outcomes = [simulate(cell, args.runs, rule, args.seed) for cell in bar]
    command = " ".join(["memwatch promise", f"--runs {args.runs}", *([f"--seed {args.seed}"] if args.seed else [])])
    text = page(outcomes, rule.false_alarms_per_run, command, (time.monotonic() - began) / 60)
    if args.output is None:
        print(text, end="")
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    broken = sum(not o.keeps(rule.false_alarms_per_run) for o in outcomes)
    print(f"{len(outcomes)} settings, {broken} of them break the promise: {args.output}", file=sys.stderr)
    return 0
