"""What stays the same over a run: noted for people who open its folder later, and said once at construction."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memwatch.config import MemWatchConfig
from memwatch.measure.observer import Observer
from memwatch.measure.probes import MIN_CONTROLS, Probe
from memwatch.messages import show_messages
from memwatch.pace import RAREST, Pace

logger = logging.getLogger("memwatch")

PACKAGES = ("memwatch", "torch", "diffusers", "accelerate", "transformers")  # that results depend on


@dataclass(frozen=True)
class About:
    """A run: what is watched, by which settings, and with which versions; ``about.json``.

    Attributes:
        model: family and prediction type of the network.
        probes: one dict per probe, control and peer: ``name``, ``prompt``, ``is_reference``, ``role`` (``probe``,
            ``control`` or ``peer``).
        settings: the configuration, nested as in a YAML file.
        machine: processor or GPU.
        versions: of the packages that results depend on.
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
        probes = [p.probe for p in observer.probes]
        roles = ["control" if p.is_control else "peer" if p.is_peer else "probe" for p in probes]
        return cls(
            model=model_of(observer),
            probes=tuple(
                {"name": p.name, "prompt": p.prompt, "is_reference": p.is_reference, "role": role}
                for p, role in zip(probes, roles, strict=True)
            ),
            settings=observer.config.to_show(),
            machine=processor(observer.ranks.accelerator.device),
            versions=versions(PACKAGES),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> About:
        """The inverse; empty where there is no file."""
        if not file.is_file():
            return cls()
        saved = json.loads(file.read_text(encoding="utf-8"))
        return cls(**saved | {"probes": tuple(saved["probes"])})


def model_of(observer: Observer) -> str:
    return f"{observer.denoiser.name}, {observer.denoiser.schedule.prediction_type}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """By package; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)  # torch's own names the build
        except PackageNotFoundError:
            continue
    return found


def processor(device: torch.device | None = None) -> str:
    """Processor, or GPU and processor."""
    gpu = [torch.cuda.get_device_name(device)] if device is not None and device.type == "cuda" else []
    return ", ".join([*gpu, platform.machine(), f"{os.cpu_count()} CPU cores"])


def machine(*packages: str, device: torch.device | None = None) -> str:
    """Versions of what numbers depend on and the processor in one line, as every result names them.

    Args:
        device: adds the GPU, or how many of the processor's cores are used.
    """
    named = [f"{name} {number}" for name, number in versions(packages).items()]
    used = [f"{torch.get_num_threads()} of them used"] if device is not None and device.type != "cuda" else []
    return ", ".join([*named, f"Python {platform.python_version()}", processor(device), *used])


# --- what memwatch says at construction -------------------------------------------------------------------------------


def say_hello(config: MemWatchConfig, observer: Observer, notes: Sequence[str] = ()) -> None:
    """Name what will be watched, and warn of what will not work; the main process alone speaks.

    Args:
        notes: what a person should know of the choice of probes and controls.
    """
    show_messages()
    if not observer.ranks.accelerator.is_main_process:
        return
    for note in notes:
        logger.info("%s", note)
    c, probes = config, [p.probe for p in observer.probes]
    watched = [probe for probe in probes if not probe.is_control and not probe.is_peer]
    num_references = sum(probe.is_reference for probe in watched)
    if not any(p.requires_grad for p in observer.model.parameters()) and not observer.trains_text:
        found = "neither the model nor a text encoder passed to memwatch has trainable parameters"
        logger.warning("%s; nothing can change", found)
    say_branch(config, observer, len(watched))
    warn_of_controls(probes)
    events = f"overhead {c.overhead:g}" if c.every_steps is None else f"every {c.every_steps} steps"
    logger.info(
        f"{model_of(observer)}; {num_references} "
        f"reference and {len(watched) - num_references} prompt probes, {sum(p.is_control for p in probes)} controls, "
        f"{sum(p.is_peer for p in probes)} peers; {len(observer.rotation)} rows in the rotation; "
        f"timesteps {c.levels.timesteps}, {c.levels.draws} draws, {c.curvature.vectors} vectors; "
        f"baseline {c.signals.baseline}; {events}; {c.output_dir}"
    )


def say_branch(config: MemWatchConfig, observer: Observer, num_watched: int) -> None:
    """Say where the unconditional branch is no second baseline, because it says the same as the prompt."""
    if config.signals.against == "snapshot":
        return
    if observer.unconditional is None:
        logger.info("this model has no unconditional branch; only snapshot baselines are used")
    elif alike := sum(not observer.knows_prompt(p) for p in observer.probes[:num_watched]):
        which = f"probes without a caption: {alike} of {num_watched}"
        logger.info("%s; only snapshot baselines are used for them", which)


def warn_of_controls(probes: Sequence[Probe]) -> None:
    """Say which probes have too few controls of their own kind to be judged by."""
    if not any(probe.is_control for probe in probes):
        consequence = "maps are shown, but alerts are uncalibrated and nothing is called memorized"
        logger.warning("there are no controls: %s", consequence)
        return
    for is_reference, kind in ((True, "images"), (False, "prompts")):
        of_kind = [probe for probe in probes if probe.is_reference is is_reference]
        watched = sum(not probe.is_control and not probe.is_peer for probe in of_kind)
        controls = sum(probe.is_control for probe in of_kind)
        if watched and controls < MIN_CONTROLS:
            few = f"there are {controls} controls that are {kind}, and judging {kind} takes {MIN_CONTROLS}"
            logger.warning("%s; the %d probes that are %s will be inconclusive", few, watched, kind)


def say_pace(pace: Pace, config: MemWatchConfig) -> None:
    """How often memwatch will measure, and whether that is more than it was allowed."""
    allowed = f"overhead: {config.overhead:g}"
    if not pace.within:
        how = "fewer probes and controls, or every_steps, change that"
        logger.warning("%s, more than %s allows; %s", pace, allowed, how)
    elif pace.every_steps > RAREST:
        why = f"that is rare, because of {allowed}; a larger one, or every_steps, changes that"
        logger.warning("%s; %s", pace, why)
    else:
        logger.info("%s (%s)", pace, allowed)
