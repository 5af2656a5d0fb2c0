"""``memwatch cost MODEL``: what watching this model costs on this machine.

Whole events of ``MemWatch`` are timed with one and with two made-up probes, and what one more costs is multiplied.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from memwatch.callback import MemWatch
from memwatch.cli import require_option
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config
from memwatch.measure.measure import count_passes
from memwatch.measure.probes import Probe
from memwatch.pace import CHOSEN, Prices, choose_pace, pace_of, synchronize
from memwatch.report.about import machine
from memwatch.scan.checkpoints import is_pipeline, load_model
from memwatch.scan.weight_files import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIPELINE = "the folder or hub id of a diffusers pipeline"
PAGE = """# What memwatch costs here

{machine}, {dtype}.

{images} images, controls included. One and two were timed, and what one more costs was multiplied. A pass is one latent
through the network, forward or backward.

| event | passes | seconds |
|---|---|---|
{events}
"""
SHARE = """
In a run of {steps} steps of {step:g} s memwatch looks every {every} steps and takes {overhead:.2g} % of training time
(overhead: {allowed:g} is allowed{verdict}).
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "What watching this model costs on this machine: seconds per event, share of training time."
    add = parser.add_argument
    add("model", metavar="MODEL", help=PIPELINE)
    add("--probes", type=int, default=8, metavar="N", help="images that are watched (default: %(default)s)")
    add("--controls", type=int, default=20, metavar="N", help="images held out (default: %(default)s)")
    add("--config", metavar="FILE", help="settings as for training (YAML)")
    add("--step-seconds", type=float, metavar="S", help="of a training step; tells the share of training time as well")
    add("--steps", type=int, default=2000, metavar="N", help="training steps of the run (default: %(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="of the network (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    for name, least in {"probes": 1, "controls": 0, "steps": 1}.items():
        require_option(getattr(args, name) >= least, f"--{name}", getattr(args, name), f"{least} or greater")
    step = args.step_seconds
    require_option(step is None or 0 < step < math.inf, "--step-seconds", step, "greater than 0")
    require_option(is_pipeline(args.model), "MODEL", args.model, PIPELINE)
    config, number = replace(load_config(args.config), max_train_steps=args.steps), args.probes + args.controls
    accelerator, seconds = Accelerator(), []
    try:
        model = load_model(args.model).to(accelerator.device, DTYPES[args.dtype])
    except CheckpointError as error:
        raise ValueError(f"MODEL: got {args.model!r}, allowed: {PIPELINE} ({error})") from error
    for count in (1, 2):
        with watching(accelerator, model, args.model, config, count) as watch:
            seconds.append(event_seconds(watch))
            passes = count_passes(config, number, 0, branches=1 if watch.observer.unconditional is None else 2)
    one, two = seconds
    first, screened, curvature = map(float, multiplied(one, two, number))
    shares = {"forward passes alone": 0.0, f"curvature of {CHOSEN:.0%}": CHOSEN} if config.screens else {}
    shares |= {"curvature of all": 1.0}
    events = [f"| {what} | {passes.of_event(c):.0f} | {screened + c * curvature:.3g} |" for what, c in shares.items()]
    where = machine("torch", "diffusers", "memwatch", device=accelerator.device)
    print(PAGE.format(machine=where, dtype=args.dtype, images=number, events="\n".join(events)), end="")
    if step is not None:
        print(share_text(config, step, first, screened, curvature), end="")
    return 0


def share_text(config: MemWatchConfig, step: float, first: float, screened: float, curvature: float) -> str:
    """How often memwatch looks in this run, and the share of training time that this takes."""
    every, steps = config.every_steps, config.max_train_steps or 1
    prices = Prices(step, first, curvature)
    if config.screens:  # the first event with curvature measures the baseline's as well
        prices = Prices(step, first + curvature, screened + CHOSEN * curvature, curvature)
    pace = choose_pace(prices, config)
    if every is not None:
        number = max(1, steps // every)
        full = sum(config.is_full_event(n) for n in range(1, number + 1)) / number
        pace = pace_of(every, prices.event + full * prices.full, prices, config)
    told = {"every": pace.every_steps, "overhead": 100 * pace.overhead, "allowed": config.overhead}
    return SHARE.format(steps=steps, step=step, verdict="" if pace.within else ", so this is more than that", **told)


@contextmanager
def watching(
    accelerator: Accelerator, model: torch.nn.Module, source: str, config: MemWatchConfig, count: int
) -> Iterator[MemWatch]:
    """memwatch on made-up images, due at every step. It says nothing of them, and its files are removed."""
    side = config.resolution or 512  # memwatch resizes it
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC) for coarse in noise]
    own: dict[str, Any] = {"every_steps": 1, "strict": True, "weights": "live"}
    own |= dict.fromkeys(("picked", "probes", "controls"))
    probes = [Probe(f"a picture of number {i}", image) for i, image in enumerate(images)]
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), TemporaryDirectory(prefix="memwatch-cost-") as folder:
            settings = replace(config, **own, output_dir=folder)
            with closing(MemWatch(accelerator, model, source, config=settings, probes=probes)) as watch:
                yield watch
    finally:
        logging.disable(logging.NOTSET)


def event_seconds(watch: MemWatch) -> np.ndarray:
    """Seconds of the first event, of a later one without any curvature, and of the curvature of all probes on top."""
    seconds, number, config = [], 0, watch.config
    while number < 2 or not config.is_full_event(number - 1):
        synchronize()
        began = time.perf_counter()
        watch.begin() if number == 0 else watch.on_step_end(number)
        synchronize()  # the GPU is waited for
        seconds.append(time.perf_counter() - began)
        number += 1
    first, *screened, full = seconds
    if not config.screens:
        return np.array([first, 0.0, full])
    usual = min(screened, default=first)
    return np.array([first, usual, max(0.0, full - usual) / 2])  # the baseline's is measured as well


def multiplied(one: np.ndarray, two: np.ndarray, number: int) -> np.ndarray:
    """Seconds of ``number`` probes, from those of one and of two."""
    more = np.where(two > one, two - one, two / 2)  # noise: no probe costs less than nothing
    total: np.ndarray = np.maximum(0, one - more) + number * more
    return total
