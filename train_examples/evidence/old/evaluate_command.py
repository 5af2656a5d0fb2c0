"""``memwatch eval MAPS MASKS``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from memwatch.cli.eval import RULE, evaluate_sets, overlap_table, read_folders


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare maps (NAME.npy) with masks (NAME.png); a map without a mask counts as non-memorized."
    add = parser.add_argument
    add("maps", type=Path, help="folder of float arrays (h, w) of any size, larger where more is stored")
    add("masks", type=Path, help="folder of masks of one size, white where memorized")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    own = f"{RULE.relative:.0%} of its peak, at least a factor of {RULE.min_factor:g}"
    own = own.replace("%", "%%")  # argparse formats its help
    help_ = f"of the fixed numbers, in the maps' unit; default: memwatch's own for each map ({own})"
    add("--threshold", type=float, help=help_)


def run(args: argparse.Namespace) -> int:
    """0; or 1 when files had to be left out."""
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"--threshold: got {args.threshold}, allowed: a finite number")
    samples, problems = read_folders(args.maps, args.masks)
    result = evaluate_sets(samples, args.threshold)
    print(overlap_table(result))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0
