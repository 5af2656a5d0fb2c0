"""``memwatch status OUTPUT_DIR``: the newest event of a run, from another shell."""

from __future__ import annotations

import argparse
from pathlib import Path

from memwatch.report.history import Run
from memwatch.report.text import SHOWN, summary

EPILOG = "Exit code: 0, or 2 where there is no run. memwatch report shows more, and can gate on it."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The newest event of a run as a table; it may still be training."
    parser.epilog = EPILOG
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="output_dir of a run, or of a scan")
    help_ = "probes that are shown, worst first (default: %(default)s)"
    parser.add_argument("--probes", type=int, default=SHOWN, metavar="N", help=help_)


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises a ``ValueError`` or ``OSError`` where there is no run."""
    if args.probes < 0:
        raise ValueError(f"--probes: got {args.probes}, allowed: 0 or greater")
    found = Run.read(args.folder)
    newest = found.events[-1]
    print(summary(newest, found.about, shown=args.probes))
    if newest is not found.last:
        print(f"the last event that was not lost is that of step {found.last.step}: {found.last.counts()}")
    return 0
