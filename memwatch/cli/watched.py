"""What a scan looks at, as its command line names it."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from memwatch.config import MemWatchConfig
from memwatch.measure.probes import Probe, as_probes
from memwatch.picking.for_run import refuse_trained_on
from memwatch.picking.pick import pick
from memwatch.picking.picked import Picked

logger = logging.getLogger("memwatch")


@dataclass(frozen=True)
class Watched:
    """What a scan looks at.

    Attributes:
        picked: what was picked of a training set; ``None`` without one.
    """

    probes: list[Probe]
    controls: list[Probe]
    picked: Picked | None = None


def watched_by(args: argparse.Namespace, config: MemWatchConfig, problems: list[str]) -> Watched:
    """The probes and controls that the command line names; what cannot be read is added to ``problems``.

    Raises:
        ValueError: there is no probe.
    """
    controls = usable(args.controls, config.seed, problems)
    probes = [*usable(args.prompts, config.seed, problems), *usable(args.images, config.seed, problems)]
    picked = picked_of(args.dataset, config, controls) if args.dataset else None
    if picked is not None:
        probes = [*probes, *picked.probes()]
    if not probes:
        raise ValueError(
            "; ".join(["nothing to look at; pass --prompts FILE, --images DIR or --dataset DIR", *problems])
        )
    return Watched(probes, controls, picked)


def picked_of(dataset: str, config: MemWatchConfig, controls: list[Probe]) -> Picked:
    """What to look at of the images that a trainer was given: it trains on all of them, so none is a control.

    Raises:
        ProbeError: it cannot be read, or a control shows one of its images.
    """
    picked = pick(dataset, controls=0, seed=config.seed)
    refuse_trained_on(controls, picked)
    if not controls:
        how = "'memwatch pick TRAIN --out WATCH' sets some aside before a training, and --controls names them"
        logger.warning("memwatch: all of %s is trained on, so that there are no controls; %s", dataset, how)
    return picked


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
