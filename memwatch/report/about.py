"""What stays the same over a run: noted for people who open its folder later, and said once at construction."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memwatch.config import MemWatchConfig
from memwatch.judge.statistic import UNKNOWN_EVENTS, called_from, threshold
from memwatch.measure.observer import Observer
from memwatch.measure.probes import MIN_CONTROLS
from memwatch.messages import show_messages
from memwatch.pace import RAREST, Pace

logger = logging.getLogger("memwatch")

PACKAGES = ("memwatch", "torch", "diffusers", "accelerate", "transformers")  # that results depend on


@dataclass(frozen=True)
class About:
    """A run: what is watched, by which settings, and with which versions; ``about.json``.

    Attributes:
        model: family and prediction type of the network.
        probes: one per probe and control: ``name``, ``prompt``, ``is_reference``, ``role`` (``probe`` or
            ``control``).
        settings: the configuration, nested as in a YAML file.
        machine, versions: processor or GPU, and the packages that results depend on.
        training_rows: rows of the guarded dataloader's data set; ``None`` where it does not say.
    """

    model: str = ""
    probes: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    training_rows: int | None = None

    @classmethod
    def of(cls, observer: Observer) -> About:
        """What an observer watches, on this machine."""
        denoiser, probes = observer.denoiser, [p.probe for p in observer.probes]
        said = [{"name": p.name, "prompt": p.prompt, "is_reference": p.is_reference} for p in probes]
        roles = ["control" if p.is_control else "probe" for p in probes]
        return cls(
            model=f"{denoiser.name}, {denoiser.schedule.prediction_type}",
            probes=tuple(probe | {"role": role} for probe, role in zip(said, roles, strict=True)),
            settings=observer.config.to_show(),
            machine=processor(observer.ranks.accelerator.device),
            versions=versions(PACKAGES),
        )

    @classmethod
    def read(cls, file: Path) -> About:
        """From ``about.json``; empty where there is no file."""
        if not file.is_file():
            return cls()
        saved = json.loads(file.read_text(encoding="utf-8"))
        return cls(**saved | {"probes": tuple(saved["probes"])})


def versions(packages: Sequence[str]) -> dict[str, str]:
    """By package; those that are not installed are left out."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = torch.__version__ if name == "torch" else version(name)  # torch's own names the build
    return found


def processor(device: torch.device | None = None) -> str:
    """Processor, or GPU and processor."""
    gpu = [torch.cuda.get_device_name(device)] if device is not None and device.type == "cuda" else []
    return ", ".join([*gpu, platform.machine(), f"{os.cpu_count()} CPU cores"])


def machine(*packages: str, device: torch.device | None = None) -> str:
    """Versions and processor in one line; ``device`` adds the GPU, or how many of the processor's cores are used."""
    named = [f"{name} {number}" for name, number in versions(packages).items()]
    used = [f"{torch.get_num_threads()} of them used"] if device is not None and device.type != "cuda" else []
    return ", ".join([*named, f"Python {platform.python_version()}", processor(device), *used])


# --- what memwatch says at construction -------------------------------------------------------------------------------


def say_hello(config: MemWatchConfig, observer: Observer, notes: Sequence[str] = ()) -> None:
    """Say ``notes`` and what will be watched, and warn of what will not work; the main process alone speaks."""
    show_messages()
    if not observer.ranks.accelerator.is_main_process:
        return
    for note in notes:
        logger.info("%s", note)
    c, about = config, About.of(observer)
    if not any(p.requires_grad for p in observer.model.parameters()) and not observer.trains_text:
        found = "neither the model nor a text encoder passed to memwatch has trainable parameters"
        logger.warning("%s; nothing can change", found)
    count = Counter((probe["role"], probe["is_reference"]) for probe in about.probes)
    roles = Counter(probe["role"] for probe in about.probes)
    images, prompts = count["probe", True], count["probe", False]
    alone = "only snapshot baselines are used"  # where the branch says the same as the prompt
    unknown = sum(not observer.knows_prompt(p) for p in observer.probes[: images + prompts])
    if c.signals.against != "snapshot" and observer.unconditional is None:
        logger.info("this model has no unconditional branch; %s", alone)
    elif c.signals.against != "snapshot" and unknown:
        logger.info(f"probes without a caption: {unknown} of {images + prompts}; {alone} for them")
    warn_of_controls(count)
    events = f"overhead {c.overhead:g}" if c.every_steps is None else f"every {c.every_steps} steps"
    logger.info(
        f"{about.model}; {images} reference and {prompts} prompt probes, {roles['control']} controls; "
        f"{len(observer.rotation)} rows in the rotation; "
        f"timesteps {c.levels.timesteps}, {c.levels.draws} draws, {c.curvature.vectors} vectors; "
        f"baseline {c.signals.baseline}; {events}; {c.output_dir}"
    )


def warn_of_controls(count: Counter[tuple[str, bool]]) -> None:
    """Say which probes have too few controls of their own kind; ``count`` is by role and by whether it is an image."""
    if not count["control", True] + count["control", False]:
        consequence = "maps are shown, but alerts are uncalibrated and nothing is called memorized"
        logger.warning("there are no controls: %s", consequence)
        return
    for is_reference, kind in ((True, "images"), (False, "prompts")):
        watched, controls = count["probe", is_reference], count["control", is_reference]
        if watched and controls < MIN_CONTROLS:
            few = f"judging {kind} takes {MIN_CONTROLS} controls that are {kind}, and there are {controls}"
            logger.warning(f"{few}; {watched} probes will be inconclusive")


def say_pace(pace: Pace, config: MemWatchConfig) -> None:
    """How often memwatch will measure, and whether that is more than it was allowed."""
    allowed, ways = f"overhead: {config.overhead:g}", "fewer probes and controls, or every_steps, change that"
    if not pace.within:
        logger.warning(f"{pace}, more than {allowed} allows; {ways}")
    elif pace.every_steps > RAREST:
        logger.warning(f"{pace}; that is rare, because of {allowed}; a larger one, or every_steps, changes that")
    else:
        logger.info(f"{pace} ({allowed})")


def say_threshold(observer: Observer, looks: int, planned: int | None) -> None:
    """From which score on a probe will be memorized; ``looks``: how many verdicts the run may give."""
    rate, probes = observer.config.alerts.false_alarms_per_run, [p.probe for p in observer.fixed]
    events = f"{planned} events" if planned else f"{UNKNOWN_EVENTS} events, as their number is not known"
    for is_reference, kind in ((True, "images"), (False, "prompts")):
        same = [p for p in probes if p.is_reference is is_reference]
        controls = sum(p.is_control for p in same)
        if len(same) > controls >= MIN_CONTROLS:
            z = called_from(threshold(rate, looks), controls)
            why = f"{controls} controls, {looks} verdicts in {events}, alerts.false_alarms_per_run: {rate:g}"
            logger.info(f"{kind} are called memorized from a mean score of {z:.1f} on ({why})")
