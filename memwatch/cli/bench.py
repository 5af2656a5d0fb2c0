"""``memwatch bench``: train and look (resumable), then compare."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from tqdm import tqdm

from memwatch.bench.methods import all_methods
from memwatch.bench.report import write
from memwatch.bench.results import check_measured, run_product
from memwatch.bench.runs import finished_runs
from memwatch.bench.sscd import read_sscd
from memwatch.bench.table import all_rows, stored_table
from memwatch.bench.train import Plan, Run, run_one
from memwatch.config import ConfigError, MemWatchConfig, load_config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="where runs lie; an interrupted command goes on"
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("train_examples/assets/tiny-sd"),
        help="the tiny Stable Diffusion to start from",
    )
    parser.add_argument(
        "--runs", nargs="*", default=["full-0", "full-1", "lora-0"], metavar="MODE-SEED", help="full-0, lora-3, ..."
    )
    parser.add_argument("--steps", type=int, help="shorter or longer runs; events are kept up to there")
    parser.add_argument("--threads", type=int, help="of torch; to run several of these side by side")
    parser.add_argument("--config", type=Path, help="what counts as the default (the shipped one)")
    parser.add_argument("--sscd", type=Path, help="TorchScript file of SSCD: a second opinion on copies, in the report")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=Path("train_examples/results"),
        help="only compare what is there, and write it here",
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing; with ``--report`` compare the finished runs instead."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.report is not None:
        compare(args.output, args.report, load_config(args.config), args.sscd)
        return 0
    chosen = [parse_run(name) for name in args.runs]
    if not (args.base / "model_index.json").is_file():
        raise ConfigError(f"--base: {args.base} is no diffusers pipeline; run from the repository, or name one")
    plan = Plan()
    if args.steps:
        events = tuple(step for step in plan.events if step < args.steps)
        plan = dataclasses.replace(plan, steps=args.steps, events=(*events, args.steps))
    for one in chosen:
        run_one(one, args.base, args.output, plan)
    return 0


def parse_run(name: str) -> Run:
    """``full-0`` or ``lora-3``."""
    mode, _, seed = name.partition("-")
    if mode not in ("full", "lora") or not seed.isdecimal():
        raise ConfigError(f"--runs: got {name!r}, allowed: full-SEED or lora-SEED")
    return Run(int(seed), mode)


def compare(folder: Path, results: Path, config: MemWatchConfig, sscd: Path | None = None) -> None:
    """Every method on the finished runs in ``folder``, written to ``results``."""
    runs = list(finished_runs(folder))
    if not runs:
        raise ValueError(f"{folder} holds no finished run; train with: memwatch bench --output {folder}")
    descriptor = read_sscd(sscd) if sscd else None
    check_measured(config)
    product = [run_product(config, run) for run in runs]
    with tqdm(total=sum(1 for _ in all_methods()), desc="methods") as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        rows = all_rows(product, config, tick)
    write(rows, stored_table(product, descriptor), results, f"memwatch bench --output {folder} --report {results}")
    print(f"{len(runs)} runs, {len(rows)} rows: {results / 'README.md'}")
