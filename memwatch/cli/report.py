"""``memwatch report OUTPUT_DIR``: a page for people, or verdicts for pipelines."""

from __future__ import annotations

import argparse
from pathlib import Path

from memwatch.act.stop import EXIT_CODE
from memwatch.report.history import Run
from memwatch.report.page import PAGE, write_page
from memwatch.report.text import as_markdown

EPILOG = f"""\
html writes {PAGE} into the folder (or to --output): one file that asks the network for nothing. md is printed; programs
read history.jsonl in the folder. Exit code, whatever the format: 0; {EXIT_CODE} when any event has called a probe
memorized, so that a pipeline can stop there; 2 where there is no run.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a run or a scan has found: where, since when, how sure, and what to do."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("folder", metavar="OUTPUT_DIR", type=Path, help="output_dir of a run, or of a scan; it may still be training")
    add("--format", choices=["html", "md"], default="html", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help=f"default: OUTPUT_DIR/{PAGE}; md goes to the terminal")


def run(args: argparse.Namespace) -> int:
    found = Run.read(args.folder)
    if args.format == "html":
        print(f"report: {write_page(args.folder, args.output)}")
    elif args.output:
        args.output.write_text(as_markdown(found) + "\n", encoding="utf-8")
    else:
        print(as_markdown(found))
    return EXIT_CODE if found.memorized else 0
