"""The benchmark: fine-tune tiny models on sets of which it is known what is planted, and compare what memwatch says.

python train_examples/evidence/bench.py --threads 1 --runs captions-0 dreambooth-0   # train; resumes
python train_examples/evidence/bench.py --report                                     # writes results/README.md
python train_examples/evidence/bench.py --ablation --output runs/ablation            # writes results/ablation.md
python train_examples/evidence/bench.py --pick                                       # writes results/pick.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from memwatch.config_file import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only what lies in its own folder
from evidence.pages.ablation import write_ablation
from evidence.pages.pairs import write_sheets
from evidence.pages.twins import write_page
from evidence.picking import write_picking
from evidence.runs.finished import Pair, finished_pairs
from evidence.runs.train import Run, run_one
from evidence.verdicts.truth import truths_of
from evidence.worlds.world import WORLDS

EXAMPLES = Path(__file__).resolve().parents[1]
RESULTS = EXAMPLES / "results"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs", "bench"), help="folder of the runs (default: %(default)s)")
    add("--base", type=Path, default=EXAMPLES / "assets" / "tiny-sd", help="pipeline to start from (default: tiny-sd)")
    help_ = f"worlds are {', '.join(WORLDS)} (default: every world with seed 0)"
    add("--runs", nargs="*", default=[f"{world}-0" for world in WORLDS], metavar="WORLD-SEED", help=help_)
    add("--steps", type=int, help="of a shorter or longer run; events are kept up to there")
    add("--timesteps", type=int, nargs="+", help="noise levels that are measured (default: the shipped ones)")
    add("--curvature", action="store_true", help="measure curvature as well, now and then: --ablation takes it")
    add("--threads", type=int, help="of torch; to run several of these side by side")
    add("--config", type=Path, help="of --report: the settings that are judged (default: the shipped ones)")
    help_ = "only compare the finished runs, and write README.md there (default: results/)"
    add("--report", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only change the rule in one thing at a time, and write ablation.md there (default: results/)"
    add("--ablation", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only draw pairs of items and generations to label by eye, and write pairs-N.png and pairs.csv there"
    add("--sheets", type=Path, metavar="FOLDER", help=help_)
    help_ = "only measure what is found in training sets before training, and write pick.md there (default: results/)"
    add("--pick", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, or write a page. 2 where nothing could be done, for the one reason given."""
    args = parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    for option, value in (("--steps", args.steps), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: got {value}, allowed: 1 or greater")
    if not (args.base / "model_index.json").is_file():
        raise ValueError(f"--base: got {str(args.base)!r}, allowed: the folder of a diffusers pipeline")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.pick is not None:
        print(write_picking(args.pick))
    elif args.report is not None:
        print(write_page(pairs_in(args.output), load_config(args.config), args.report))
    elif args.ablation is not None:
        print(write_ablation(pairs_in(args.output), args.ablation))
    elif args.sheets is not None:
        print(write_sheets(truths_of(pairs_in(args.output)), args.sheets))
    else:
        for one in [run for name in args.runs for run in parse_runs(name)]:
            train(one, args.base, args.output, args)


def pairs_in(folder: Path) -> list[Pair]:
    """Finished twins.

    Raises:
        ValueError: there are none.
    """
    pairs = list(finished_pairs(folder))
    if not pairs:
        raise ValueError(f"--output: {folder} holds no pair of finished twins; train some first")
    return pairs


def train(run: Run, base: Path, folder: Path, args: argparse.Namespace) -> None:
    """One run by its world's own plan, or one of another length or at other noise levels."""
    plan = WORLDS[run.world].plan
    if args.steps is not None:
        plan = replace(plan, steps=args.steps)
    if args.timesteps:
        plan = replace(plan, timesteps=tuple(args.timesteps))
    plan = replace(plan, curvature=args.curvature)
    run_one(run, base, folder, plan)


def parse_runs(name: str) -> list[Run]:
    """``captions-0``: both twins of a world and a seed; ``captions-0b``: one of them.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\w+)-(\d+)([ab]?)", name)
    if match is None or match[1] not in WORLDS:
        allowed = f"WORLD-SEED or WORLD-SEED and a or b, with a world of {', '.join(WORLDS)}"
        raise ValueError(f"--runs: got {name!r}, allowed: {allowed}")
    return [Run(int(match[2]), match[1], half) for half in match[3] or WORLDS[match[1]].halves]


if __name__ == "__main__":
    sys.exit(main())
