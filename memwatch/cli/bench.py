"""``memwatch bench``: train and look (resumable), then compare."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from memwatch.bench.forecasts import write_forecasts
from memwatch.bench.methods import Method, all_methods
from memwatch.bench.page import Extras, write
from memwatch.bench.picking import write_picking
from memwatch.bench.prompts import prompt_table
from memwatch.bench.proofs import proof_table
from memwatch.bench.results import run_product
from memwatch.bench.rivals import RIVALS
from memwatch.bench.rows import all_rows
from memwatch.bench.runs import finished_runs
from memwatch.bench.screening import write_screening
from memwatch.bench.sscd import read_sscd
from memwatch.bench.tables import null_table, stored_table
from memwatch.bench.train import Run, read_base, run_one
from memwatch.bench.worlds import WORLDS
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

TINY_SD = Path("train_examples", "assets", "tiny-sd")  # in a clone
RESULTS = Path("train_examples", "results")


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_ = "where runs lie; an interrupted command goes on (default: %(default)s)"
    add("--output", type=Path, default=Path("runs", "bench"), help=help_)
    add("--base", type=Path, help=f"the tiny Stable Diffusion to start from (default: {TINY_SD} of memwatch's clone)")
    runs = [f"{world}-0" for world in WORLDS if world != "null"]
    help_ = f"worlds are {', '.join(WORLDS)} (default: {' '.join(runs)})"
    add("--runs", nargs="*", default=runs, metavar="WORLD-SEED", help=help_)
    add("--steps", type=int, help="shorter or longer runs; events are kept up to there")
    add("--threads", type=int, help="of torch; to run several of these side by side")
    add("--config", type=Path, help="what counts as the default (the shipped one)")
    add("--sscd", type=Path, help="TorchScript file of SSCD: a second opinion on copies, in the report")
    help_ = "only judge the runs that are there screened and in full, and write what differs here (%(const)s)"
    add("--screen", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only fine-tune with an event every 20 steps, and write how well forecasts hold here (%(const)s)"
    add("--forecast", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only measure what is found in training sets before training, and write it here (%(const)s)"
    add("--pick", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "only measure what memwatch costs beside the published procedure, and write it here (%(const)s)"
    add("--cost", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help=help_)
    help_ = "networks of --cost: tiny-sd, and of Stable Diffusion 1.5's size at 32x32 and 64x64 (default: all)"
    add("--cost-models", nargs="*", metavar="NAME", help=help_)
    help_ = "only compare what is there, and write it here (%(const)s)"
    add("--report", type=Path, nargs="?", const=RESULTS, help=help_)


def run(args: argparse.Namespace) -> int:
    """Train what is missing; with ``--report`` compare the finished runs instead."""
    for option, value in (("--steps", args.steps), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: got {value}, allowed: 1 or greater")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.screen is not None:
        runs = list(finished_runs(args.output))
        if not runs:
            raise ValueError(f"{args.output} holds no finished run; train with: memwatch bench --output {args.output}")
        command = f"memwatch bench --output {args.output} --screen {args.screen}"
        print(write_screening(runs, load_config(args.config), args.screen, command))
        return 0
    if args.forecast is not None:
        level, command = load_config(args.config).alerts.min_severity, f"memwatch bench --output {args.output}"
        command += f" --forecast {args.forecast}"
        print(write_forecasts(find_base(args.base), args.output, args.forecast, level, command))
        return 0
    if args.pick is not None:
        print(write_picking(args.pick, f"memwatch bench --pick {args.pick}"))
        return 0
    if args.cost is not None:
        cost(args.output, args.cost, load_config(args.config), args.cost_models, args.base)
        return 0
    if args.report is not None:
        compare(args.output, args.report, load_config(args.config), args.sscd, [*all_methods(), *RIVALS], args.base)
        return 0
    chosen, base = [parse_run(name) for name in args.runs], find_base(args.base)
    for one in chosen:
        plan = WORLDS[one.world].plan
        if args.steps:
            events = tuple(step for step in plan.events if step < args.steps)
            plan = dataclasses.replace(plan, steps=args.steps, events=(*events, args.steps))
        run_one(one, base, args.output, plan)
    return 0


def parse_run(name: str) -> Run:
    """``full-0`` or ``lora-3``: a world and a seed.

    Raises:
        ValueError: anything else.
    """
    world, _, seed = name.partition("-")
    if world not in WORLDS or not seed.isdecimal():
        raise ValueError(f"--runs: got {name!r}, allowed: WORLD-SEED with a world of {', '.join(WORLDS)}")
    return Run(int(seed), world)


def find_base(given: Path | None) -> Path:
    """The pipeline to start from: the one given, or the one of the clone that memwatch or the user is in.

    Raises:
        ValueError: there is none.
    """
    clone = Path(__file__).resolve().parents[2]
    places = [given] if given is not None else [clone / TINY_SD, Path.cwd() / TINY_SD]
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
    from memwatch.bench.cost import MODELS
    from memwatch.bench.cost_page import measure_all, write

    chosen = MODELS if models is None else tuple(models)
    if unknown := [name for name in chosen if name not in MODELS]:
        raise ValueError(f"--cost-models: got {unknown[0]!r}, allowed: {', '.join(MODELS)}")
    found = measure_all(find_base(base), folder, config, chosen)
    named = f" --cost-models {' '.join(chosen)}" if models is not None else ""
    write(found, results, f"memwatch bench --output {folder} --cost {results}{named}")
    print(f"costs: {results / 'cost.md'}")


def compare(
    folder: Path,
    results: Path,
    config: MemWatchConfig,
    sscd: Path | None,
    methods: Sequence[Method],
    base: Path | None = None,
) -> None:
    """Every method on the finished runs in ``folder``, written to ``results``.

    Raises:
        ValueError: there is none, or it did not measure what ``config`` asks for.
    """
    runs = list(finished_runs(folder))
    if not runs:
        raise ValueError(f"{folder} holds no finished run; train with: memwatch bench --output {folder}")
    descriptor = read_sscd(sscd) if sscd else None
    product = [run_product(config, run) for run in runs if run.planted]
    if not product:
        raise ValueError(f"{folder} holds no finished run with planted items; train with: memwatch bench --runs full-0")
    rows = all_rows(product, config, methods)
    prompts, proofs = prompt_table(product, config), proof_table(product, read_base(find_base(base))[1].vae)
    nulls = [run_product(config, run) for run in finished_runs(folder) if not run.planted]
    told = null_table(nulls) if nulls else ()
    extras = Extras(stored_table(product, descriptor), told, prompts, proofs)
    write(rows, extras, results, f"memwatch bench --output {folder} --report {results}")
    print(f"{len(product)} planted runs, {len(nulls)} without, {len(rows)} rows: {results / 'README.md'}")
