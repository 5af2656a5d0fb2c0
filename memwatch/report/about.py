"""About: what stays the same over a run, for people who open its folder later."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memwatch.measure.observer import Observer
from memwatch.measure.probes import Probe

PACKAGES = ("memwatch", "torch", "diffusers", "accelerate", "transformers")  # that results depend on


@dataclass(frozen=True)
class About:
    """A run: what is watched, by which settings, and with which versions.

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
        denoiser, device = observer.denoiser, observer.ranks.accelerator.device
        return cls(
            model=f"{denoiser.name}, {denoiser.schedule.prediction_type}",
            probes=watched(observer),
            settings=observer.config.to_show(),
            machine=processor(device),
            versions=versions(PACKAGES),
        )

    def to_dict(self) -> dict[str, Any]:
        """``about.json``."""
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> About:
        """The inverse; empty where there is no file."""
        if not file.is_file():
            return cls()
        saved = json.loads(file.read_text(encoding="utf-8"))
        return cls(**saved | {"probes": tuple(saved["probes"])})


def watched(observer: Observer) -> tuple[dict[str, Any], ...]:
    """See ``About.probes``."""

    def role(probe: Probe) -> str:
        return "control" if probe.is_control else "peer" if probe.is_peer else "probe"

    probes = [p.probe for p in observer.probes]
    return tuple({"name": p.name, "prompt": p.prompt, "is_reference": p.is_reference, "role": role(p)} for p in probes)


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
    """Versions and processor in one line, as every result names them.

    Args:
        packages: what the numbers depend on.
        device: adds the GPU, or how many of the processor's cores are used.
    """
    named = [f"{name} {number}" for name, number in versions(packages).items()]
    used = [f"{torch.get_num_threads()} of them used"] if device is not None and device.type != "cuda" else []
    return ", ".join([*named, f"Python {platform.python_version()}", processor(device), *used])
