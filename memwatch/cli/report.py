"""``memwatch report OUTPUT_DIR``: a page for people, or verdicts for pipelines."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memwatch.judge.stop import EXIT_CODE
from memwatch.report.history import Run
from memwatch.report.page import PAGE, write_page
from memwatch.report.serve import serve, stamp
from memwatch.report.text import as_json, as_markdown

EPILOG = f"""\
html writes {PAGE} into the folder (or to --output): one file that asks the network for nothing. md and json are
printed. Exit code, whatever the format: 0; {EXIT_CODE} when any event has called a probe memorized, so that a
pipeline can stop there; 2 where there is no run. --watch and --serve go on until Ctrl-C, and end with 0.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a run or a scan has found: where, since when, how sure, and what to do."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("folder", metavar="OUTPUT_DIR", type=Path, help="output_dir of a run, or of a scan; it may still be training")
    add("--format", choices=["html", "md", "json"], default="html", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help=f"default: OUTPUT_DIR/{PAGE}; md and json go to the terminal")
    going = parser.add_mutually_exclusive_group()
    going.add_argument("--watch", action="store_true", help="write the page anew whenever the run has a new event")
    help_ = "serve it on this machine only (127.0.0.1), and renew it while the run goes on"
    going.add_argument("--serve", action="store_true", help=help_)
    add("--port", type=int, default=6007, help="of --serve; 0 takes a free one (default: %(default)s)")
    help_ = "between two looks of --watch and --serve, and of the open page (default: %(default)s)"
    add("--every", type=float, default=10.0, metavar="SECONDS", help=help_)


def run(args: argparse.Namespace) -> int:
    for option, value, ok, allowed in (
        ("--every", args.every, args.every > 0, "greater than 0"),
        ("--port", args.port, 0 <= args.port < 65536, "0 to 65535"),
        (
            "--format",
            args.format,
            args.format == "html" or not (args.watch or args.serve),
            "html with --watch and --serve",
        ),
    ):
        if not ok:
            raise ValueError(f"{option}: got {value}, allowed: {allowed}")
    if args.serve:
        serve(args.folder, args.port, args.every)
        return 0
    if args.watch:
        watch(args.folder, args.output, args.every)
        return 0
    found = Run.read(args.folder)
    if args.format == "html":
        print(f"report: {write_page(args.folder, args.output)}")
    else:
        text = as_markdown(found) if args.format == "md" else json.dumps(as_json(found), indent=1)
        if args.output:
            args.output.write_text(text + "\n", encoding="utf-8")
        else:
            print(text)
    return EXIT_CODE if found.memorized else 0


def watch(folder: Path, file: Path | None, every: float, wait: Callable[[float], Any] = time.sleep) -> None:
    """Write the page whenever the history has grown, until Ctrl-C. A run that has not begun is waited for."""
    seen: tuple[int, int] | None = None
    try:
        while True:
            if (now := stamp(folder)) is not None and now != seen:
                try:
                    print(f"report: {write_page(folder, file, renew=every)}", flush=True)
                    seen = now
                except ValueError:  # the first line is being written
                    pass
            elif now is None and seen is None:
                print(f"waiting for the first event in {folder}", flush=True)
                seen = (0, 0)
            wait(every)
    except KeyboardInterrupt:
        print("the page stays as it is")
