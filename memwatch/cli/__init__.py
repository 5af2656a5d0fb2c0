"""The command ``memwatch``.

Each subcommand is one line here and one module with ``arguments(parser)`` and ``run(args)``; ``run`` returns the exit
code.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from memwatch.messages import show_messages

COMMANDS = {  # name: (module, what it does)
    "clean": ("memwatch.cli.clean", "write an image folder without the images behind what was found"),
    "cost": ("memwatch.cli.cost", "what watching a model costs on this machine: seconds, memory, share of training"),
    "pick": ("memwatch.cli.pick", "pick what to watch of a training set, and show it before training"),
    "report": ("memwatch.cli.report", "one HTML page of a run or a scan; or its verdicts, for people and pipelines"),
    "scan": ("memwatch.cli.scan", "look for what finished checkpoints have stored"),
    "status": ("memwatch.cli.status", "the newest event of a run as a table, while it trains"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done; 1 done in part (what failed is named); 2 nothing could be done, for the one reason given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="memwatch", description="What a diffusion model has stored from its training images, and where."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv[:1]:  # only the module that is asked for is imported
            importlib.import_module(module).arguments(command)
    args = parser.parse_args(argv)
    show_messages()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except (ValueError, OSError, RuntimeError) as error:  # ConfigError and ProbeError are ValueErrors
        print(f"memwatch {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def require_option(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise a ``ValueError`` that names a command-line option, unless ``holds``."""
    if not holds:
        raise ValueError(f"{option}: got {value!r}, allowed: {allowed}")
