"""What a scan looks at, as its command line names it."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from memwatch.config import MemWatchConfig
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.choice import Choice, choose
from memwatch.picking.run import BUDGET, CACHE

logger = logging.getLogger("memwatch")


@dataclass(frozen=True)
class Watched:
    """What a scan looks at.

    Attributes:
        choice: what was picked of a training set; ``None`` without one.
    """

    probes: list[Probe]
    controls: list[Probe]
    choice: Choice | None = None


def watched_by(args: argparse.Namespace, config: MemWatchConfig, problems: list[str]) -> Watched:
    """The probes and controls that the command line names; what cannot be read is added to ``problems``.

    Raises:
        ValueError: there is no probe.
    """
    controls = usable(args.controls, config.seed, problems)
    probes = [*usable(args.prompts, config.seed, problems), *usable(args.images, config.seed, problems)]
    choice = picked(args.dataset, config, controls) if args.dataset else None
    if choice is not None:
        probes, controls = [*probes, *choice.probes()], choice.controls()
    if not probes:
        raise ValueError(
            "; ".join(["nothing to look at; pass --prompts FILE, --images DIR or --dataset DIR", *problems])
        )
    return Watched(probes, controls, choice)


def picked(dataset: str, config: MemWatchConfig, controls: list[Probe]) -> Choice:
    """What to look at of the images that a trainer was given: it trains on all of them, so none is a control."""
    pick = replace(config.pick, hold_out=0, set_aside=0, peers=0, rotation=0)
    budget = config.probes if isinstance(config.probes, int) else BUDGET
    cache = Path(config.output_dir) / CACHE
    choice = choose(dataset, pick, probes=budget, seed=config.seed, cache=cache, controls=controls or None)
    if controls:
        for note in choice.notes:
            logger.warning("memwatch: %s", note)
    else:
        how = "'memwatch pick --hold-out' sets some aside before a training, and --controls names them"
        logger.warning("memwatch: all of %s is trained on, so that there are no controls; %s", dataset, how)
    return choice


def usable(source: str | None, seed: int, problems: list[str]) -> list[Probe]:
    """Probes of a source whose image can be read; the others are added to ``problems``."""
    good = []
    for probe in as_probes(source, seed=seed):
        try:
            if isinstance(probe.image, str | Path):
                Image.open(probe.image).convert("RGB").close()
            good.append(probe)
        except Exception as error:  # PIL has its own for broken and huge files
            problems.append(f"{probe.name}: cannot read image {probe.image}: {error}")
    return good
