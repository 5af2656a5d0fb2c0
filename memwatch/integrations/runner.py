"""Runner: what the runners of other people's trainers have in common."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from memwatch.callback import MemWatch
from memwatch.config import MemWatchConfig
from memwatch.config_file import load_config

logger = logging.getLogger("memwatch")


def refuse(why: object) -> NoReturn:
    """End the program with one message and exit code 2, before training."""
    print(f"memwatch: {' '.join(str(why).split())}", file=sys.stderr)
    raise SystemExit(2)


def import_theirs(module: str, trainer: str, folder: str) -> Any:
    """A module of the trainer's, from ``folder``.

    Raises:
        SystemExit: it is not there, or something that it needs is not.
    """
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        refuse(f"cannot import {module!r} from {folder} ({error}); run this in {trainer}'s folder and environment")


def read_settings(file: str | None, trainer: str) -> MemWatchConfig:
    """The configuration in a YAML file, with what a runner cannot do switched off, and said.

    Raises:
        SystemExit: there is none, or it asks for what cannot be done.
    """
    if not file:
        refuse("--memwatch: got nothing, allowed: a YAML file with the settings, 'probes' and 'controls' among them")
    try:
        config = load_config(file)
    except ValueError as error:
        refuse(error)
    if config.picked is None and config.probes is None:
        how = "an image folder or prompts, or 'picked' with a folder that 'memwatch pick' has written"
        refuse(f"config key 'probes': got {config.probes!r}, allowed: {how}")
    if config.rollback:
        how = "let it save every so many steps"
        logger.info("memwatch: rollback is off, because %s saves in a format of its own; %s", trainer, how)
    return replace(config, rollback=False, precision="loop")


def watch_or_refuse(*args: Any, **options: Any) -> MemWatch:
    """``MemWatch``; what is wrong with its configuration ends the program."""
    try:
        return MemWatch(*args, **options)
    except ValueError as error:  # ConfigError and ProbeError are ValueErrors
        refuse(error)


def has_stopped(watch: MemWatch) -> bool:
    """Whether the run that is resumed was stopped, which is said; it trains no further."""
    if watch.should_stop:
        go_on = "to train on, resume an earlier checkpoint, or without memwatch's state beside it"
        logger.warning("memwatch has stopped this run before (%s); %s", watch.stop_reason, go_on)
    return watch.should_stop


def pipeline_of(vae: Any, scheduler: Any, device: torch.device, **changes: Any) -> SimpleNamespace:
    """What ``MemWatch`` takes for a pipeline: the scheduler, and a float32 copy of the VAE on ``device``.

    Trainers leave their own VAE on the CPU, or in a type in which some give NaN. The copy takes 0.3 GB.

    Args:
        changes: to the VAE's config.
    """
    ours = copy.deepcopy(vae).to(device, torch.float32).eval().requires_grad_(False)
    ours.register_to_config(**changes)
    return SimpleNamespace(vae=ours, scheduler=scheduler)


def shorter_side(resolution: Any) -> int | None:
    """Of a resolution as trainers write it; ``None`` where there is none.

    >>> shorter_side("512"), shorter_side((768, 512)), shorter_side(None)
    (512, 512, None)
    """
    sides = [int(side) for side in re.findall(r"\d+", str(resolution))]
    return min(sides) if sides else None
