"""``memwatch bench``: train and look (resumable), then compare."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from evidence.old.forecasts import write_forecasts
from evidence.old.summary import bars_of, rewrite
from evidence.pages.results import write_page
from evidence.picking import write_picking
from evidence.runs.finished import finished_runs
from evidence.runs.train import Run, run_one
from evidence.worlds.world import WORLDS
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

TINY_SD = Path("train_examples", "assets", "tiny-sd")  # in a clone
CLONE = Path(__file__).resolve().parents[2]  # where memwatch is run from one
RESULTS = Path("train_examples", "results")


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_ = "where runs lie; an interrupted command goes on (default: %(default)s)"
    add("--output", type=Path, default=Path("runs", "bench"), help=help_)
    add("--base", type=Path, help=f"the tiny Stable Diffusion to start from (default: {TINY_SD} of memwatch's clone)")
    help_ = f"worlds are {', '.join(WORLDS)} (default: every world with seed 0)"
    add("--runs", nargs="*", default=[f"{world}-0" for world in WORLDS], metavar="WORLD-SEED", help=help_)
    add("--steps", type=int, help="shorter or longer runs; events are kept up to there")
    add("--threads", type=int, help="of torch; to run several of these side by side")
    add("--config", type=Path, help="what counts as the default (the shipped one)")
    help_ = "of --report: model file of SSCD (.onnx), as one more rule for what is a copy"
    add("--sscd", type=Path, help=help_)
    help_ = "only fine-tune with an event every 20 steps, and write how well forecasts hold here (%(const)s)"
    add("--forecast", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only measure what is found in training sets before training, and write it here (%(const)s)"
    add("--pick", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only measure what memwatch costs beside the published procedure, and write it here (%(const)s)"
    add("--cost", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "networks of --cost: tiny-sd, and of Stable Diffusion 1.5's size at 32x32 and 64x64 (default: all)"
    add("--cost-models", nargs="*", metavar="NAME", help=help_)
    help_ = "only compare what is there, and write it here (%(const)s)"
    add("--report", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)


def run(args: argparse.Namespace) -> int:
    """Train what is missing; with ``--report`` compare the finished runs instead."""
    for option, value in (("--steps", args.steps), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: got {value}, allowed: 1 or greater")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.forecast is not None:
        level, command = load_config(args.config).alerts.min_severity, f"memwatch bench --output {args.output}"
        command += f" --forecast {args.forecast}"
        print(write_forecasts(find_base(args.base), args.output, args.forecast, level, command))
    elif args.pick is not None:
        print(write_picking(args.pick, f"memwatch bench --pick {args.pick}"))
    elif args.cost is not None:
        cost(args.output, args.cost, load_config(args.config), args.cost_models, args.base)
    elif args.report is not None:
        compare(args.output, args.report, load_config(args.config), args.sscd, args.base)
    else:
        for one in [parse_run(name) for name in args.runs]:
            train(one, find_base(args.base), args.output, args.steps)
    return 0


def train(run: Run, base: Path, folder: Path, steps: int | None) -> None:
    """One run by its world's own plan, or one of another length."""
    plan = WORLDS[run.world].plan
    if steps is not None:
        plan = dataclasses.replace(plan, steps=steps, events=(*(s for s in plan.events if s < steps), steps))
    run_one(run, base, folder, plan)


def parse_run(name: str) -> Run:
    """``captions-0`` or ``lora-3``: a world and a seed.

    Raises:
        ValueError: anything else.
    """
    world, _, seed = name.rpartition("-")
    if world not in WORLDS or not seed.isdecimal():
        raise ValueError(f"--runs: got {name!r}, allowed: WORLD-SEED with a world of {', '.join(WORLDS)}")
    return Run(int(seed), world)


def find_base(given: Path | None) -> Path:
    """The pipeline to start from: the one given, or the one of the clone that memwatch or the user is in.

    Raises:
        ValueError: there is none.
    """
    places = [given] if given is not None else [CLONE / TINY_SD, Path.cwd() / TINY_SD]
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    if given is not None:
        raise ValueError(f"--base: got {str(given)!r}, allowed: the folder of a diffusers pipeline")
    looked = " or ".join(map(str, places))
    raise ValueError(f"--base: missing, and there is no {looked}; pass the tiny-sd folder of a clone of memwatch")


def cost(
    folder: Path, results: Path, config: MemWatchConfig, models: Sequence[str] | None, base: Path | None = None
) -> None:
    """What memwatch costs beside the published procedure, written to ``results``.

    Raises:
        ValueError: a model that is not known.
    """
    from evidence.old.cost import MODELS
    from evidence.old.cost_page import measure_all, write

    chosen = MODELS if models is None else tuple(models)
    if unknown := [name for name in chosen if name not in MODELS]:
        raise ValueError(f"--cost-models: got {unknown[0]!r}, allowed: {', '.join(MODELS)}")
    found = measure_all(find_base(base), folder, config, chosen)
    named = f" --cost-models {' '.join(chosen)}" if models is not None else ""
    write(found, results, f"memwatch bench --output {folder} --cost {results}{named}")
    print(f"costs: {results / 'cost.md'}")


def compare(folder: Path, results: Path, config: MemWatchConfig, sscd: Path | None, base: Path | None = None) -> None:
    """Everything that finished runs say, written to ``results``.

    Raises:
        ValueError: there is none, or none with planted items.
    """
    runs = list(finished_runs(folder))
    if not any(run.planted for run in runs):
        hint = f"train with: memwatch bench --output {folder}"
        raise ValueError(f"{folder} holds no finished run with planted items; {hint}")
    named = f" --sscd {sscd.name}" if sscd is not None else ""
    command = f"memwatch bench --output {folder} --report {results}{named}"
    print(write_page(runs, config, results, command, sscd, find_base(base)))
    readme = CLONE / "README.md"
    if results.resolve() == (CLONE / RESULTS).resolve() and rewrite(readme, bars_of(results)):
        print(readme)
